"""The generating engine's input, an encoded prompt, and its output, events."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from baichuan_omni_jax.errors import RequestError

__all__ = ["AudioCodes", "Event", "Finished", "GenerationResult", "Prompt", "RequestError", "TextDelta"]


@runtime_checkable
class Prompt(Protocol):
    """An encoded prompt of n tokens: what a model reads of `data_pipelines.documents.document.EncodedDocument`.

    Media lie in order of appearance. Slots count from 0 at the first token. Where `audio_codes` of audio are not
    known yet they are zeros, and `mels` (frames, mels) of its windows, with the places of their first code frames in
    `mel_places`, are what the audio encoder makes them of.
    """

    # Read-only, so that a frozen dataclass has them.
    @property
    def tokens(self) -> Int32[np.ndarray, "n"]: ...
    @property
    def audio_codes(self) -> Int32[np.ndarray, "a q"]: ...
    @property
    def audio_slots(self) -> Int32[np.ndarray, "a"]: ...
    @property
    def patches(self) -> UInt8[np.ndarray, "p v"]: ...
    @property
    def patch_grid(self) -> Int32[np.ndarray, "p 2"]: ...
    @property
    def patch_frames(self) -> Int32[np.ndarray, "p"]: ...
    @property
    def visual_slots(self) -> Int32[np.ndarray, "v"]: ...
    @property
    def mels(self) -> tuple[Float32[np.ndarray, "_ mels"], ...]: ...
    @property
    def mel_places(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TextDelta:
    """Text that came next, and its tokens with their log-probabilities (of the model, before penalty and cuts)."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class AudioCodes:
    """Code frames that came next (12.5 a second); `last` ends a stretch of speech (its end frame is not among them)."""

    codes: Int32[np.ndarray, "n q"]
    last: bool


@dataclass(frozen=True)
class Finished:
    """The answer is whole. `finish_reason` is `end` (the model's end of text), `stop` (a stop string), `length` or
    `cancelled`.

    Seconds count from the request: `first_token`, `first_frame` (None: no speech), `total`. `tokens` and `frames` were
    generated; `prompt` (tokens) were read.
    """

    finish_reason: str
    prompt: int
    tokens: int
    frames: int
    first_token: float | None
    first_frame: float | None
    total: float
    sequence: Int32[np.ndarray, " n"] = field(repr=False)
    """Prompt and answer as tokens, pads where frames stand."""


Event = TextDelta | AudioCodes | Finished


@dataclass(frozen=True)
class GenerationResult:
    """A whole answer: its text and tokens, and the code frames of each stretch of speech, in order."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    speech: tuple[Int32[np.ndarray, "_ q"], ...]
    finished: Finished

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> "GenerationResult":
        """The answer that a request's events make, of which the last is `Finished`."""
        events = list(events)
        finished = events[-1]
        assert isinstance(finished, Finished)
        deltas = [event for event in events if isinstance(event, TextDelta)]
        speech, stretch = [], []
        for event in events:
            if isinstance(event, AudioCodes):
                stretch.append(event.codes)
                if event.last:
                    speech.append(np.concatenate(stretch))
                    stretch = []
        if stretch:  # cancelled in mid-speech
            speech.append(np.concatenate(stretch))
        return cls(
            text="".join(delta.text for delta in deltas),
            tokens=tuple(token for delta in deltas for token in delta.tokens),
            logprobs=tuple(p for delta in deltas for p in delta.logprobs),
            speech=tuple(speech),
            finished=finished,
        )
