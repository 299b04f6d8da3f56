"""The language model alone on a CPU against transformers' `generate` with the very same weights, greedy, cached.

    pip install -e '.[parity]' && JAX_PLATFORMS=cpu python benchmarks/decode_cpu.py [--num-layers 24] [--json]

A Qwen2 of the shape of 0.5B with random weights, in one process, torch with as many threads as there are cores. The two
take turns, with pauses for the threads of the one to rest; medians.

Decode: tokens a second of `--new` tokens after a prompt of 16, its reading included on both sides; ours decodes several
tokens in one program. The tokens must be the same in fp32. Prefill: the seconds of a prompt of 1024 tokens up to
its first new token. Recompiles: programs that the generating engine compiles for 50 prompts of different lengths after
`warm_up`; a small model, as the count does not depend on sizes.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rows import emit, row

from baichuan_omni_jax.config import GenerationConfig, MeshConfig, OmniConfig, tiny
from baichuan_omni_jax.config.architecture import AudioHeadConfig, LLMConfig
from baichuan_omni_jax.convert import branch_rules, load_branch_from_safetensors
from baichuan_omni_jax.convert.safetensors_io import TensorInfo
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.llm.kv_cache import KVCache, init_cache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh

SHORT, LONG = 16, 1024
# Tokens that one program decodes.
STEPS_PER_CALL = 8
SIZES = {
    "num_layers": 24,
    "hidden_size": 896,
    "num_heads": 14,
    "num_kv_heads": 2,
    "head_dim": 64,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A state dict as the source of a conversion."""

    values: Mapping[str, np.ndarray]
    location: str = "the state dict"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(x.shape, x.dtype) for name, x in self.values.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.values[name][slice(None) if rows is None else rows]


def omni_config(llm: LLMConfig) -> OmniConfig:
    """The language model's sizes in a whole configuration, whose other branches are not made."""
    small = tiny()
    vision = dataclasses.replace(small.vision, out_dim=llm.hidden_size)
    return dataclasses.replace(small, llm=llm, vision=vision, audio_head=AudioHeadConfig(head_dim=llm.head_dim))


def make_theirs(cfg: LLMConfig) -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        intermediate_size=cfg.intermediate_size,
        rms_norm_eps=cfg.norm_eps,
        rope_theta=cfg.rope_theta,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def convert(model: transformers.Qwen2ForCausalLM, abstract: LanguageModel) -> LanguageModel:
    weights = Arrays({name: x.detach().numpy() for name, x in model.state_dict().items()})
    return load_branch_from_safetensors(weights, branch_rules(omni_config(abstract.cfg))["llm"], abstract)


@partial(jax.jit, donate_argnames="cache")
def read(model: LanguageModel, cache: KVCache, tokens: jax.Array) -> tuple[KVCache, jax.Array]:
    """A whole prompt (1, t), and the token after it (1, 1)."""
    hidden, cache = model(model.embed(tokens), jnp.arange(tokens.shape[1])[None], cache=cache)
    return cache, jnp.argmax(model.logits(hidden[:, -1:]), -1).astype(jnp.int32)


@partial(jax.jit, donate_argnames="cache")
def decode(model: LanguageModel, cache: KVCache, token: jax.Array, at: jax.Array) -> tuple[KVCache, jax.Array]:
    """The `STEPS_PER_CALL` tokens after `token`, which is written at position `at`."""

    def step(carry, n):
        cache, token = carry
        hidden, cache = model(model.embed(token), (at + n)[None, None], cache=cache)
        token = jnp.argmax(model.logits(hidden), -1).astype(jnp.int32)
        return (cache, token), token[0, 0]

    (cache, _), tokens = jax.lax.scan(step, (cache, token), jnp.arange(STEPS_PER_CALL))
    return cache, tokens


class Ours:
    """Greedy answers to one prompt at a time, out of one cache."""

    def __init__(self, model: LanguageModel, length: int):
        self._model = model
        self._cache = init_cache(model.cfg, 1, length, model.compute.dtype, model.compute)

    def __call__(self, prompt: np.ndarray, new: int) -> np.ndarray:
        self._cache, token = read(self._model, self._cache, prompt[None])
        tokens = [np.asarray(token)[0]]
        for at in range(len(prompt), len(prompt) + new - 1, STEPS_PER_CALL):
            self._cache, more = decode(self._model, self._cache, tokens[-1][None, -1:], np.int32(at))
            tokens.append(np.asarray(more))
        return np.concatenate(tokens)[:new]


def theirs(model: transformers.Qwen2ForCausalLM, prompt: np.ndarray, new: int) -> np.ndarray:
    tokens = torch.from_numpy(prompt).long()[None]
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return made[0, len(prompt) :].numpy().astype(np.int32)


def seconds(answer: Callable, *args) -> tuple[float, np.ndarray]:
    time.sleep(0.3)
    start = time.perf_counter()
    made = answer(*args)
    return time.perf_counter() - start, made


def compare(ours: Ours, peer: Callable, prompt: np.ndarray, new: int, repeats: int) -> tuple[float, float, int]:
    """Median seconds of ours and of the peer, and how many leading tokens are the same."""
    both = [(seconds(ours, prompt, new), seconds(peer, prompt, new)) for _ in range(repeats + 1)]
    mine, other = both[0][0][1], both[0][1][1]
    same = int(np.argmin(np.append(mine == other, False)))
    medians = (statistics.median(pair[side][0] for pair in both[1:]) for side in (0, 1))
    return *medians, same


def measure(abstract: LanguageModel, new: int, repeats: int) -> list[dict]:
    cfg = abstract.cfg
    rng = np.random.default_rng(0)
    short, long = (rng.integers(0, cfg.vocab_size, n, dtype=np.int32) for n in (SHORT, LONG))
    reference = make_theirs(cfg)
    stacked = convert(reference, abstract)
    models = {name: stacked.to_decode_layout(name) for name in TORCH}
    del stacked
    rows, shape = [], f"{cfg.num_layers} layers of width {cfg.hidden_size}, vocabulary {cfg.vocab_size}"
    for name, dtype in TORCH.items():
        ours, peer = Ours(models[name], LONG + new + STEPS_PER_CALL), partial(theirs, reference.to(dtype))
        mine, other, same = compare(ours, peer, short, new, repeats)
        rows.append(
            row(
                f"decode_{'fp32' if name == 'float32' else 'bf16'}",
                new / mine,
                "tokens/s",
                peer="transformers generate",
                peer_value=new / other,
                ratio=other / mine,
                goal=">= 1.0" if name == "float32" else None,
                ok=other / mine >= 1.0 and same == new if name == "float32" else None,
                note=f"{shape}; {new} tokens after {SHORT}, the first {same} the same",
            )
        )
        if name == "float32":
            mine, other, same = compare(ours, peer, long, 1, repeats)
            rows.append(
                row(
                    "prefill_1k",
                    mine,
                    "s",
                    peer="transformers generate",
                    peer_value=other,
                    ratio=other / mine,
                    goal=">= 1.0",
                    ok=other / mine >= 1.0 and same == 1,
                    note=f"{shape}; fp32, {LONG} tokens up to the next",
                )
            )
    return rows


def measure_recompiles(prompts: int) -> dict:
    """The engine over prompts of different lengths."""
    cfg = tiny()
    llm = jax.jit(lambda key: LanguageModel(key, cfg.llm, ComputePolicy(remat="none")))(jax.random.key(0))
    engine = Engine({"llm": llm}, cfg, None, slots=2, length=512)
    engine.warm_up()
    before = engine.compiles
    settings = dataclasses.replace(GenerationConfig().greedy(), max_tokens=4)
    rng = np.random.default_rng(0)
    lengths = rng.choice(np.arange(1, 500), prompts, replace=False)
    keys = jax.random.split(jax.random.key(1), prompts)
    answers = engine.generate([text(rng, n, cfg) for n in lengths], settings, list(keys))
    made = engine.compiles - before
    return row(
        "recompiles",
        made,
        "programs",
        goal="== 0",
        ok=made == 0 and all(answer.tokens for answer in answers),
        note=f"{prompts} prompts of {lengths.min()} to {lengths.max()} tokens after {before} programs of warm_up",
    )


def text(rng: np.random.Generator, length: int, cfg: OmniConfig) -> SimpleNamespace:
    """A prompt of random tokens that are no special ones, without media."""
    nothing = {
        "audio_codes": np.zeros((0, cfg.audio.levels), np.int32),
        "audio_slots": np.zeros(0, np.int32),
        "patches": np.zeros((0, cfg.vision.patch_values), np.uint8),
        "patch_grid": np.zeros((0, 2), np.int32),
        "patch_frames": np.zeros(0, np.int32),
        "visual_slots": np.zeros(0, np.int32),
        "mels": (),
        "mel_places": (),
    }
    return SimpleNamespace(tokens=rng.integers(100, cfg.llm.vocab_size, length, dtype=np.int32), **nothing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--new", type=int, default=33, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=50, help="prompts of the row recompiles")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cfg = LLMConfig(**{name: getattr(args, name) for name in SIZES}, qkv_pack=False)
    # Outside the mesh, to which the shapes would else be bound.
    abstract = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), cfg, ComputePolicy(remat="none")))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), torch.inference_mode():
        rows = [*measure(abstract, args.new, args.repeats), measure_recompiles(args.prompts)]
    return emit(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
