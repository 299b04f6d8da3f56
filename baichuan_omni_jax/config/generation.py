"""How answers are generated: how tokens and codes are sampled, how long they may grow, when they end."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from baichuan_omni_jax.errors import ConfigError

READ_AT_LEAST = 2.5
"""Seconds that a segment of spoken text takes at least: ten Chinese characters, as the released demos read."""

VOICE = "邻家女声"
"""The voice that the system prompt of every released speech demo names."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one token is sampled from its logits: the repetition penalty, then temperature, then top-k, then top-p.

    The defaults sample nothing: the likeliest token is taken.
    """

    temperature: float = 0.0  # divides the logits; 0: the likeliest is taken
    top_k: int = 0  # all but so many of the likeliest are left out; 0: none
    top_p: float = 1.0  # all but the fewest likeliest whose probabilities reach this together are left out; 1: none
    # The logits of what the sequence already holds are divided by it where positive, multiplied where negative; 1: no
    # penalty.
    repetition_penalty: float = 1.0

    def __post_init__(self):
        finite = 0 <= self.temperature < math.inf and 0 < self.repetition_penalty < math.inf
        if not finite or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{self}: temperature and top_k must not be negative, top_p must lie in (0, 1], "
                "repetition_penalty must be positive, and all must be finite"
            )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How one answer is generated; the defaults are those of the released demos.

    A spoken answer is a segment of text, then its speech, in turn. The first segment ends where the model begins to
    speak; later ones also at punctuation (`speech_segments`), once they take about `segment_seconds` to speak.
    """

    speech: bool = False  # whether the answer is spoken; else it is text alone
    voice: str = VOICE  # named to the model by the system prompt of a conversation that has none of its own
    max_tokens: int = 1024  # text tokens of the whole answer
    stop: tuple[str, ...] = ()  # the answer goes no further than one of these strings, which is left out
    # How an answer of text alone is sampled, then the first and the later text segments of a spoken one, then codes.
    text: SamplingConfig = SamplingConfig(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1)
    first_segment: SamplingConfig = SamplingConfig(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1)
    segment: SamplingConfig = SamplingConfig(temperature=0.3, top_k=20, top_p=0.85, repetition_penalty=1.05)
    codes: SamplingConfig = SamplingConfig(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3)
    segment_tokens: int = 50  # text tokens of a segment, at most
    segment_frames: int = 500  # code frames of a segment's speech, at most: 40 s at 12.5 a second
    # Seconds: no less than the segments that the model was trained on (`--shortest` of the synthesis).
    segment_seconds: float = READ_AT_LEAST
    max_segments: int = 100  # segments of an answer

    def __post_init__(self):
        for name in ("max_tokens", "segment_tokens", "segment_frames", "max_segments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.segment_seconds <= 3600:
            raise ConfigError(f"segment_seconds {self.segment_seconds} must lie between 0 and 3600")
        check_voice(self.voice)
        # A string alone would be taken for its characters, and the empty one is found everywhere.
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop {self.stop!r} must be a tuple of strings, none of them empty")

    def greedy(self) -> "GenerationConfig":
        """Returns the same, with nothing sampled and no penalty."""
        likeliest = SamplingConfig()
        return replace(self, text=likeliest, first_segment=likeliest, segment=likeliest, codes=likeliest)


def check_voice(voice: str) -> None:
    """Raises ConfigError for what cannot be the name of a voice: the system prompt holds it between brackets."""
    if not isinstance(voice, str) or len(voice.strip().splitlines()) != 1 or any(sign in voice for sign in "【】\n\r"):
        raise ConfigError(f"voice {voice!r} must be a name in one line, without 【 and 】")
    try:
        voice.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"voice {voice!r} is not valid Unicode: {error.reason}") from error


def settings_fields(settings: GenerationConfig) -> dict[str, Any]:
    """Lists what differs from the defaults, nested as the configuration is."""

    def differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            if isinstance(value, dict):
                value = differing(value, defaults[name])
                if value:
                    found[name] = value
            elif value != defaults[name]:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found

    return differing(asdict(settings), asdict(GenerationConfig()))
