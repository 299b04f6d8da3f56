"""How answers are generated: how tokens and codes are drawn, how long they may grow, when they end."""

import math
from dataclasses import dataclass, fields

from baichuan_omni_jax.errors import ConfigError

READ_AT_LEAST = 2.5
"""Seconds that a piece of spoken text takes at least: ten Chinese characters, as the released demos read."""

VOICE = "邻家女声"
"""The voice that the system prompt of every released speech demo names."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one token is drawn from its logits.

    First the logits of what the sequence already holds are divided by `repetition_penalty` where positive, multiplied
    where negative (1: no penalty); then `temperature` divides them (0: the likeliest is taken, nothing is drawn); then
    all but the `top_k` likeliest are left out (0: none), then all but the fewest likeliest whose probabilities reach
    `top_p` together.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
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

    `speech` answers aloud: a piece of text, at most `piece_tokens`, then its speech, at most `piece_frames` code frames
    (12.5 a second), in turn, `max_pieces` times at most. The first piece, drawn by `first_piece`, ends where the model
    begins to speak; later ones, drawn by `piece`, also at punctuation (`speech_pieces`), once they take about
    `piece_seconds` to speak: no less than the pieces that the model was trained on (`--shortest` of the synthesis).
    `voice` is named to the model by the system prompt of a conversation that has none of its own. Without `speech` the
    answer is text alone, drawn by `text`. Either way at most `max_tokens` text tokens, and no further than one of the
    strings `stop`, which is left out.
    """

    speech: bool = False
    voice: str = VOICE
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    text: SamplingConfig = SamplingConfig(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1)
    first_piece: SamplingConfig = SamplingConfig(temperature=0.8, top_k=20, top_p=0.85, repetition_penalty=1.1)
    piece: SamplingConfig = SamplingConfig(temperature=0.3, top_k=20, top_p=0.85, repetition_penalty=1.05)
    codes: SamplingConfig = SamplingConfig(temperature=0.5, top_k=5, top_p=0.85, repetition_penalty=1.3)
    piece_tokens: int = 50
    piece_frames: int = 500
    piece_seconds: float = READ_AT_LEAST
    max_pieces: int = 100

    def __post_init__(self):
        for name in ("max_tokens", "piece_tokens", "piece_frames", "max_pieces"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.piece_seconds <= 3600:
            raise ConfigError(f"piece_seconds {self.piece_seconds} must lie between 0 and 3600")
        check_voice(self.voice)
        # A string alone would be taken for its characters, and the empty one is found everywhere.
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop {self.stop!r} must be a tuple of strings, none of them empty")

    def greedy(self) -> "GenerationConfig":
        """The same, with nothing drawn and no penalty."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return GenerationConfig(
            **{k: SamplingConfig() if isinstance(v, SamplingConfig) else v for k, v in values.items()}
        )


def check_voice(voice: str) -> None:
    """Raises ConfigError for what cannot be the name of a voice: the system prompt holds it between brackets."""
    if not isinstance(voice, str) or len(voice.strip().splitlines()) != 1 or any(sign in voice for sign in "【】\n\r"):
        raise ConfigError(f"voice {voice!r} must be a name in one line, without 【 and 】")
    try:
        voice.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"voice {voice!r} is not valid Unicode: {error.reason}") from error
