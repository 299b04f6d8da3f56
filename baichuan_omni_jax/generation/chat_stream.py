"""One answer as it reaches its caller: text and audio event by event, or whole.

`TtsRequest` speaks what is given: one request a sentence, each continuing the text and the speech of those before.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.events import AudioCodes, Event, Finished, GenerationResult, Prompt, TextDelta


@runtime_checkable
class EventSource(Protocol):
    """What the engine gives for a prompt: events as they come, and a way to end it early."""

    def __iter__(self) -> Iterator[Event]: ...

    def cancel(self) -> None: ...


@runtime_checkable
class SpeechStream(Protocol):
    """Code frames in, audio out as far as it is ready; `last` ends a stretch; `close` gives the rest."""

    def push(self, codes: np.ndarray, last: bool = False) -> np.ndarray: ...

    def close(self) -> np.ndarray: ...


@runtime_checkable
class SpeechSynthesizer(Protocol):
    """What decodes code frames to audio at `rate` Hz; `vocoder` names what makes the waveform."""

    rate: int
    vocoder: str

    def stream(self) -> SpeechStream: ...


@dataclass(frozen=True)
class AudioChunk:
    """Audio that came next: mono, full scale 1, at `rate` Hz (24000 in released checkpoints)."""

    samples: Float32[np.ndarray, " n"]
    rate: int


ChatEvent = TextDelta | AudioChunk | Finished


@dataclass(frozen=True)
class ChatAnswer(GenerationResult):
    """One whole answer: text, tokens, code frames, and `samples` (mono, full scale 1) at `rate` Hz made of those.

    `message` is the assistant's message that a later prompt needs; `first_audio` and `seconds` count from the request
    (None: no audio). `rate` is 0 where nothing could speak.
    """

    samples: Float32[np.ndarray, " t"]
    rate: int
    message: dict[str, Any]
    first_audio: float | None
    seconds: float

    @property
    def codes(self) -> Int32[np.ndarray, "n q"]:
        """The code frames of all speech, one after the other; (0, 0) without any."""
        return np.concatenate(self.speech) if self.speech else np.zeros((0, 0), np.int32)

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


class ChatStream:
    """An iterator of `TextDelta`, `AudioChunk` and at last `Finished`; taking an event does the work for it.

    Letting go of it, or `cancel`, ends the request. Raises RequestError from `next` when the request fails on the way.
    """

    def __init__(self, request: EventSource, speech_decoder: SpeechSynthesizer | None):
        self._request, self._speech_decoder = request, speech_decoder
        self._record = _Record()
        # A generator that knows nothing of this object: it is closed as soon as this object is let go of.
        self._events = _events(request, speech_decoder, self._record)

    def __iter__(self) -> Iterator[ChatEvent]:
        return self

    def __next__(self) -> ChatEvent:
        return next(self._events)

    def cancel(self) -> None:
        """Ends the request, also from another thread: its last event, `Finished`, follows without further audio."""
        self._record.cancelled = True
        self._request.cancel()

    def on_end(self, callback: Callable[[dict[str, Any]], None]) -> None:
        """`callback` gets the assistant's message when the reply is over, however it ended."""
        self._record.callback = callback

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message so far: text, and speech as `codes` (n, levels), in the order they were made."""
        return self._record.message()

    def answer(self) -> ChatAnswer:
        """Waits for the end and returns the whole answer, with what was taken from the iterator before.

        Raises RequestError `failed` when the reply broke off before its end.
        """
        for _ in self:
            pass
        record = self._record
        # Over without `Finished`: who took the failing event has seen the error, this caller has not.
        if not record.events or not isinstance(record.events[-1], Finished):
            raise RequestError("failed", "the answer broke off before its end")
        whole = GenerationResult.from_events(record.events)
        return ChatAnswer(
            **{field.name: getattr(whole, field.name) for field in fields(whole)},
            samples=np.concatenate([np.zeros(0, np.float32), *record.chunks]),
            rate=self._speech_decoder.rate if self._speech_decoder else 0,
            message=self.message,
            first_audio=record.first_audio,
            seconds=record.seconds,
        )


@dataclass
class _Record:
    """What an answer holds so far. Of a stretch of speech, `codes` is a list until the message is asked for."""

    started: float = field(default_factory=time.monotonic)
    events: list[Event] = field(default_factory=list)
    chunks: list[np.ndarray] = field(default_factory=list)
    content: list[dict[str, Any]] = field(default_factory=list)
    first_audio: float | None = None
    seconds: float = 0.0
    cancelled: bool = False
    callback: Callable[[dict[str, Any]], None] = lambda message: None

    def add(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished):
            self.seconds = time.monotonic() - self.started
        elif isinstance(event, TextDelta):
            if not self.content or self.content[-1]["type"] != "text":
                self.content.append({"type": "text", "text": ""})
            self.content[-1]["text"] += event.text
        else:
            # A stretch of speech is one part of the message, however many events it came in.
            if not self.content or self.content[-1].get("whole", True):
                self.content.append({"type": "audio", "codes": [], "whole": False})
            self.content[-1]["codes"].append(event.codes)
            self.content[-1]["whole"] = event.last

    def add_audio(self, samples: Float32[np.ndarray, " n"]) -> None:
        if self.first_audio is None:
            self.first_audio = time.monotonic() - self.started
        self.chunks.append(samples)

    def message(self) -> dict[str, Any]:
        # Frames are joined when the message is asked for: a stretch comes in many small events.
        content = [
            {"type": "audio", "codes": np.concatenate(part["codes"])} if "codes" in part else dict(part)
            for part in self.content
        ]
        return {"role": "assistant", "content": content}


def _events(request: EventSource, speech_decoder: SpeechSynthesizer | None, record: _Record) -> Iterator[ChatEvent]:
    stream = speech_decoder.stream() if speech_decoder else None
    try:
        for event in request:
            # Speech first: the end of the answer comes behind its last samples.
            if speech_decoder and stream and not record.cancelled and not isinstance(event, TextDelta):
                audio = stream.push(event.codes, event.last) if isinstance(event, AudioCodes) else stream.close()
                if len(audio):
                    record.add_audio(audio)
                    yield AudioChunk(audio, speech_decoder.rate)
            record.add(event)
            if not isinstance(event, AudioCodes):
                yield event
    except Exception:
        record.callback = lambda message: None  # what failed is no turn of a conversation
        raise
    finally:
        # However it ended: the slot is free, and a conversation hears of what there is.
        request.cancel()
        record.callback(record.message())


Prompts = Generator[Prompt, Int32[np.ndarray, "n q"], None]
"""Prompts that end with the mark that begins speech; each is sent the code frames of the one before."""


def sentence_prompts(processor: Any, sentences: Sequence[str]) -> Prompts:
    """Encodes the sentences one by one, each after those before and their speech.

    Raises RequestError when there is nothing to say.
    """
    spoken = [sentence for sentence in sentences if sentence.strip()]
    if not spoken:
        raise RequestError("bad_message", "there is nothing to say: the text is empty")
    spoken_so_far: list[dict[str, Any]] = []
    for sentence in spoken:
        spoken_so_far.append({"type": "text", "text": sentence})
        codes = yield processor.encode_content(spoken_so_far, speak=True)
        if len(codes):
            spoken_so_far.append({"type": "audio", "codes": codes})


def one_prompt(prompt: Prompt) -> Prompts:
    """A single prompt that is encoded already."""
    yield prompt


class TtsRequest:
    """The frames of each prompt's speech as events, at last one `Finished` for all; text that follows is left out.

    Raises RequestError here for what the engine refuses of the first prompt, and when iterated for the others.
    """

    def __init__(self, engine: Any, prompts: Prompts, settings: GenerationConfig, key: PRNGKeyArray):
        self._engine, self._prompts, self._settings, self._key = engine, prompts, settings, key
        self._cancelled = False
        self._request = self._submit(next(prompts))

    def cancel(self) -> None:
        self._cancelled = True
        self._request.cancel()

    def __iter__(self) -> Iterator[Event]:
        ended: list[Finished] = []
        while not self._cancelled:
            codes = []
            for event in self._request:
                if isinstance(event, AudioCodes):
                    codes.append(event.codes)
                    yield event
                    # Text after the speech is not wanted: the sentence is over.
                    if event.last:
                        self._request.cancel()
                elif isinstance(event, Finished):
                    ended.append(event)
            try:
                # A sentence's prompt holds the speech before it: no sentence can be read ahead of the one before.
                spoken_so_far = np.concatenate(codes) if codes else np.zeros((0, 0), np.int32)
                self._request = self._submit(self._prompts.send(spoken_so_far))
            except StopIteration:
                break
        cut = any(each.finish_reason == "length" for each in ended)
        yield _together(ended, "cancelled" if self._cancelled else "length" if cut else "end")

    def _submit(self, prompt: Prompt) -> Any:
        return self._engine.submit(prompt, self._settings, self._key)


def _together(ended: Sequence[Finished], reason: str) -> Finished:
    """One `Finished` for requests that came one after the other; no text is given."""
    return Finished(
        finish_reason=reason,
        prompt=sum(each.prompt for each in ended),
        tokens=0,
        frames=sum(each.frames for each in ended),
        first_token=None,
        first_frame=ended[0].first_frame if ended else None,
        total=sum(each.total for each in ended),
        sequence=ended[-1].sequence if ended else np.zeros(0, np.int32),
    )
