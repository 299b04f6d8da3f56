"""One answer as it reaches whoever asked: text and sound piece by piece, or whole."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32

from baichuan_omni_jax.omni.answer import Event, Finished, Frames, TextPiece

CROSS_FADE = 0.010  # seconds over which one stretch of speech runs into the next, as in the released demos


@runtime_checkable
class Requested(Protocol):
    """What the engine gives for a prompt: events as they come, and a way to end it early."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None: ...


@runtime_checkable
class SpeechStream(Protocol):
    """Code frames in, sound out as far as it is ready; `close` gives the rest."""

    def push(self, codes: np.ndarray) -> np.ndarray: ...

    def close(self) -> np.ndarray: ...


@runtime_checkable
class Speaks(Protocol):
    """What makes sound of code frames at `rate` Hz; `vocoder` names what makes the waveform."""

    rate: int
    vocoder: str

    def stream(self) -> SpeechStream: ...


@dataclass(frozen=True)
class AudioChunk:
    """Sound that came next: mono, full scale 1, at `rate` Hz (24000 in released checkpoints)."""

    samples: Float32[np.ndarray, " n"]
    rate: int


ChatEvent = TextPiece | AudioChunk | Finished


@dataclass(frozen=True)
class ChatAnswer:
    """One whole answer: its text, `samples` (mono, full scale 1) at `rate` Hz and the code frames they were made of.

    `message` is the assistant's message that a later prompt needs; `first_audio` and `seconds` count from the request
    (None: no sound). `rate` is 0 where nothing could speak.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    codes: Int32[np.ndarray, "n q"]
    samples: Float32[np.ndarray, " t"]
    rate: int
    finished: Finished
    message: dict[str, Any]
    first_audio: float | None
    seconds: float

    @property
    def audio_seconds(self) -> float:
        return len(self.samples) / self.rate if self.rate else 0.0

    @property
    def real_time_factor(self) -> float | None:
        """Seconds taken for a second of speech, all of the request counted; None without speech."""
        return self.seconds / self.audio_seconds if self.audio_seconds else None

    @property
    def tokens_per_second(self) -> float:
        """Text tokens and code frames, each one step of the language model."""
        return (self.finished.tokens + self.finished.frames) / max(self.finished.total, 1e-9)


class Reply:
    """An iterator of `TextPiece`, `AudioChunk` and at last `Finished`; taking an event does the work for it.

    Letting go of it, or `cancel`, ends the request. Raises RequestError from `next` when the request fails on the way.
    """

    def __init__(self, request: Requested, speaker: Speaks | None, levels: int):
        self._request, self._speaker, self._levels = request, speaker, levels
        self._record = _Record()
        # A generator that knows nothing of this object: it is closed as soon as this object is let go of.
        self._events = _events(request, speaker, self._record)

    def __iter__(self) -> Iterator[ChatEvent]:
        return self

    def __next__(self) -> ChatEvent:
        return next(self._events)

    def cancel(self) -> None:
        """Ends the request, also from another thread: its last event, `Finished`, follows without further sound."""
        self._record.cancelled = True
        self._request.cancel()

    def on_end(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """`tell` gets the assistant's message when the reply is over, however it ended."""
        self._record.tell = tell

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message so far: text, and speech as `codes` (n, levels), in the order they were made."""
        return self._record.message()

    def answer(self) -> ChatAnswer:
        """Waits for the end and returns the whole answer, with what was taken from the iterator before."""
        for _ in self:
            pass
        record, message = self._record, self.message
        assert record.finished is not None
        codes = [part["codes"] for part in message["content"] if "codes" in part]
        return ChatAnswer(
            text="".join(piece.text for piece in record.pieces),
            tokens=tuple(token for piece in record.pieces for token in piece.tokens),
            logprobs=tuple(value for piece in record.pieces for value in piece.logprobs),
            codes=np.concatenate([np.zeros((0, self._levels), np.int32), *codes]),
            samples=np.concatenate([np.zeros(0, np.float32), *record.chunks]),
            rate=self._speaker.rate if self._speaker else 0,
            finished=record.finished,
            message=message,
            first_audio=record.first_audio,
            seconds=record.seconds,
        )


@dataclass
class _Record:
    """What an answer holds so far. Of a stretch of speech, `codes` is a list until the message is asked for."""

    started: float = field(default_factory=time.monotonic)
    pieces: list[TextPiece] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    content: list[dict[str, Any]] = field(default_factory=list)
    finished: Finished | None = None
    first_audio: float | None = None
    seconds: float = 0.0
    cancelled: bool = False
    tell: Callable[[dict[str, Any]], None] = lambda message: None

    def add_text(self, piece: TextPiece) -> None:
        self.pieces.append(piece)
        if not self.content or self.content[-1]["type"] != "text":
            self.content.append({"type": "text", "text": ""})
        self.content[-1]["text"] += piece.text

    def add_codes(self, frames: Frames) -> None:
        if not self.content or self.content[-1].get("whole", True):
            self.content.append({"type": "audio", "codes": [], "whole": False})
        self.content[-1]["codes"].append(frames.codes)
        self.content[-1]["whole"] = frames.last

    def add_sound(self, samples: Float32[np.ndarray, " n"]) -> None:
        if self.first_audio is None:
            self.first_audio = time.monotonic() - self.started
        self.chunks.append(samples)

    def end(self, finished: Finished) -> None:
        self.finished, self.seconds = finished, time.monotonic() - self.started

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": [_frozen(part) for part in self.content]}


def _events(request: Requested, speaker: Speaks | None, record: _Record) -> Iterator[ChatEvent]:
    voice = _JoinedSpeech(speaker) if speaker else None
    try:
        for event in request:
            if isinstance(event, TextPiece):
                record.add_text(event)
                yield event
                continue
            if isinstance(event, Frames):
                record.add_codes(event)
            if voice and not record.cancelled:
                sound = voice.push(event.codes, event.last) if isinstance(event, Frames) else voice.close()
                if len(sound):
                    record.add_sound(sound)
                    yield AudioChunk(sound, speaker.rate)
            if isinstance(event, Finished):
                record.end(event)
                yield event
    finally:
        request.cancel()
        record.tell(record.message())


def _frozen(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "audio", "codes": np.concatenate(part["codes"])} if "codes" in part else dict(part)


class _JoinedSpeech:
    """Stretches of speech as one waveform: the end of each runs into the beginning of the next."""

    def __init__(self, speaker: Speaks):
        self._speaker, self._fade = speaker, round(CROSS_FADE * speaker.rate)
        self._stream: SpeechStream | None = None
        self._end = np.zeros(0, np.float32)

    def push(self, codes: Int32[np.ndarray, "n q"], last: bool) -> Float32[np.ndarray, " t"]:
        """The sound that is ready; `last` ends a stretch, whose last moment waits for the next one."""
        if self._stream is None:
            self._stream = self._speaker.stream()
        ready = self._stream.push(codes)
        if last:
            ready = np.concatenate([ready, self._stream.close()])
            self._stream = None
        if len(ready):
            ready, self._end = cross_faded(self._end, ready), np.zeros(0, np.float32)
        if not last:
            return ready
        kept = max(0, len(ready) - self._fade)
        self._end = np.concatenate([self._end, ready[kept:]])
        return ready[:kept]

    def close(self) -> Float32[np.ndarray, " t"]:
        """What is left when nothing follows."""
        rest = self._stream.close() if self._stream else np.zeros(0, np.float32)
        return cross_faded(self._end, rest)


def cross_faded(first: Float32[np.ndarray, " a"], second: Float32[np.ndarray, " b"]) -> Float32[np.ndarray, " t"]:
    """`first` running into `second` over all of the shorter: a + b - min(a, b) samples.

    >>> cross_faded(np.ones(4, np.float32), np.zeros(2, np.float32)).tolist()
    [1.0, 1.0, 0.75, 0.25]
    """
    n = min(len(first), len(second))
    rising = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / max(n, 1)
    before = len(first) - n
    return np.concatenate([first[:before], first[before:] * (1 - rising) + second[:n] * rising, second[n:]])
