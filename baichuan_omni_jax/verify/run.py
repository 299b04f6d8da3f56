"""All checks of a fixtures folder, and the report that they make."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.verify import decoding, language, media
from baichuan_omni_jax.verify.fixtures import Fixtures, exact_arithmetic
from baichuan_omni_jax.verify.golden import Golden, Row, unchecked

# A check is called as its file is.
CHECKS: dict[str, Callable[[Fixtures, Golden], None]] = {
    "vision": media.vision,
    "audio_encoder": media.audio_encoder,
    "audio_encoder_single": media.audio_encoder_single,
    "audio_quantizer": media.audio_quantizer,
    "rvq": media.rvq,
    "audio_decoder": decoding.audio_decoder,
    "audio_decoder_single": decoding.audio_decoder_single,
    "flow_matching": decoding.flow_matching,
    "flow_matching_long": decoding.flow_matching,
    "audio_head": language.audio_head,
    "llm": language.llm,
    "packed": language.packed,
    "omni": language.omni,
    "generate_text": language.generate_text,
    "generate_audio": language.generate_audio,
    "vocoder_io": decoding.vocoder,
    "vocoder_unvoiced_io": decoding.vocoder,
}


def verify(folder: Path | str, only: Collection[str] = ()) -> Iterator[tuple[str, list[Row]]]:
    """Name and lines of the report of one check after the other (`only` these, by default all).

    A golden tensor, or a whole file, that no check looks at is a line that fails. Raises ConfigError, before anything
    is computed, when a file is missing or damaged or the weights do not fit the tables.
    """
    if unknown := [name for name in only if name not in CHECKS]:
        raise ConfigError(f"check {unknown[0]!r} is not one of {', '.join(CHECKS)}")
    fixtures = Fixtures(folder)
    goldens = {name: fixtures.golden(name) for name in CHECKS if not only or name in only}
    for name, gold in goldens.items():
        yield name, run_check(fixtures, gold)
    for name in fixtures.golden_names():
        if name not in CHECKS and not only:
            yield name, [unchecked(name, tensor) for tensor in fixtures.golden(name).names]


def run_check(fixtures: Fixtures, gold: Golden) -> list[Row]:
    """The lines of one check. Raises ConfigError when its inputs do not fit the configuration."""
    try:
        with exact_arithmetic():
            CHECKS[gold.check](fixtures, gold)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{fixtures.folder / gold.check}.safetensors does not fit its config: {reason}") from error
    return gold.rows()
