"""All checks of a fixtures folder, and one against the released PyTorch code itself, where the user has it.

`verify_released` gives both models the same token ids, a left-padded batch of text, in fp32; where the mask is 1 their
logits must agree. One model is in memory at a time (fp32: 4 bytes a parameter). Needs torch and transformers (the extra
`parity`). It has been run against a stand-in of the released code only (tests/verify/test_released.py: the released
tensor names around transformers' Qwen2), not against the released code and weights.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from baichuan_omni_jax.checkpoint import abstract_branches, load_branches, with_shardings
from baichuan_omni_jax.checkpoint.branches import CONFIG
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.verify import language, media
from baichuan_omni_jax.verify.fixtures import (
    COMPUTE,
    Comparison,
    Fixtures,
    Golden,
    compared,
    exact_arithmetic,
    unchecked,
)
from baichuan_omni_jax.verify.language import forward

# A check is called as its file is.
CHECKS: dict[str, Callable[[Fixtures, Golden], None]] = {
    "vision": media.vision,
    "audio_encoder": media.audio_encoder,
    "audio_encoder_single": media.audio_encoder_single,
    "audio_quantizer": media.audio_quantizer,
    "rvq": media.rvq,
    "audio_decoder": media.audio_decoder,
    "audio_decoder_single": media.audio_decoder_single,
    "flow_matching": media.flow_matching,
    "flow_matching_long": media.flow_matching,
    "audio_head": language.audio_head,
    "llm": language.llm,
    "packed": language.packed,
    "omni": language.omni,
    "generate_text": language.generate_text,
    "generate_audio": language.generate_audio,
    "vocoder_io": media.vocoder,
    "vocoder_unvoiced_io": media.vocoder,
}


def verify(folder: Path | str, only: Collection[str] = ()) -> Iterator[tuple[str, list[Comparison]]]:
    """Runs one check after the other (`only` these, by default all) and yields its name and comparisons.

    A golden tensor, or a whole file, that no check looks at is a comparison that fails. Raises ConfigError, before
    anything is computed, when a file is missing or damaged or the weights do not fit the tables.
    """
    if unknown := [name for name in only if name not in CHECKS]:
        raise ConfigError(f"check {unknown[0]!r} is not one of {', '.join(CHECKS)}")
    # Every file is opened before the first check computes: a damaged one is found at once.
    fixtures = Fixtures(folder)
    goldens = {name: fixtures.golden(name) for name in CHECKS if not only or name in only}
    for name, gold in goldens.items():
        yield name, run_check(fixtures, gold)
    # Files that no check knows would prove nothing in silence.
    for name in fixtures.golden_names():
        if name not in CHECKS and not only:
            yield name, [unchecked(name, tensor) for tensor in fixtures.golden(name).names]


def run_check(fixtures: Fixtures, gold: Golden) -> list[Comparison]:
    """Runs one check and returns its comparisons. Raises ConfigError when its inputs do not fit the configuration."""
    try:
        with exact_arithmetic():
            CHECKS[gold.check](fixtures, gold)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{fixtures.folder / gold.check}.safetensors does not fit its config: {reason}") from error
    return gold.comparisons()


LENGTHS = (48, 29)
CHECK, BRANCH = "released", "llm"


def verify_released(released: Path, checkpoint: Path, *, seed: int = 0) -> list[Comparison]:
    """Compares our checkpoint's `llm` with the model of folder `released`: one comparison a sequence.

    Runs the Python files of `released`. Raises ConfigError when either cannot be read, when torch or transformers is
    missing, and when the released code fails.
    """
    auto = _auto_model()
    if not (released / CONFIG).is_file():
        raise ConfigError(f"--hf {released} is not a Hugging Face folder: it has no {CONFIG}")
    config = read_hf(checkpoint / CONFIG)
    tokens, mask = padded_batch(config, seed)
    ours = _our_logits(config, checkpoint, tokens, mask)
    reference = _released_logits(auto, released, tokens, mask)
    # Another vocabulary or length is a comparison that fails, not an error.
    if reference.shape != ours.shape:
        return [compared(CHECK, "logits", ours, reference)]
    real = mask == 1
    return [compared(CHECK, f"logits_{i}", ours[i, row], reference[i, row]) for i, row in enumerate(real)]


def padded_batch(config: OmniConfig, seed: int) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]]:
    """Draws token ids and mask of two texts of unequal length, padded on the left; no id means media."""
    plain = np.setdiff1d(np.arange(config.llm.vocab_size, dtype=np.int32), astuple(config.tokens))
    tokens = np.random.default_rng(seed).choice(plain, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]
    return tokens.astype(np.int32), mask.astype(np.int32)


def _our_logits(
    config: OmniConfig, checkpoint: Path, tokens: np.ndarray, mask: np.ndarray
) -> Float[np.ndarray, "b t v"]:
    # Made on no mesh: `with_shardings` places the parameters.
    module = abstract_branches(config, only=[BRANCH], compute=COMPUTE)[BRANCH]
    with exact_arithmetic():
        abstract = with_shardings(
            module, jax.sharding.get_mesh(), COMPUTE.rules, dtype=jnp.dtype(jnp.float32), name=BRANCH
        )
        llm = load_branches(str(checkpoint), {BRANCH: abstract})[BRANCH]
        _, logits = forward(llm, tokens, np.cumsum(mask, 1, dtype=np.int32), mask)
        return np.asarray(logits)


def _released_logits(auto: Any, released: Path, tokens: np.ndarray, mask: np.ndarray) -> Float[np.ndarray, "b t v"]:
    import torch

    try:
        model = auto.from_pretrained(
            str(released), trust_remote_code=True, local_files_only=True, torch_dtype=torch.float32
        ).eval()
        ids, seen = (torch.from_numpy(x).long() for x in (tokens, mask))
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=seen, position_ids=seen.cumsum(1), use_cache=False)
        return out.logits.float().numpy()
    except Exception as error:  # code of the user's folder: it raises whatever it likes
        first = str(error).strip().splitlines()[:1] or ["no reason given"]
        raise ConfigError(f"the code of {released} fails: {type(error).__name__}: {first[0]}") from error


def _auto_model() -> Any:
    try:
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(
            f"--hf needs torch and transformers: pip install 'baichuan_omni_jax[parity]' ({error})"
        ) from error
    return AutoModelForCausalLM
