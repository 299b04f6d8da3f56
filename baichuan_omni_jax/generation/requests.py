"""A request to the engine: what its caller holds (`Request`), and what the engine does for it (`ActiveRequest`).

Tokens become text as they come: whole characters only, and nothing that may still become a stop string.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt32
from tokenizers import Tokenizer

from baichuan_omni_jax.config import GenerationConfig, SpecialTokens
from baichuan_omni_jax.generation.events import AudioCodes, Event, Finished, Prompt, RequestError, TextDelta
from baichuan_omni_jax.generation.slots import FinishReason, OutputKind, StepOutput

_UNFINISHED = "\ufffd"
# A character is at most four bytes, so at most three tokens wait for its last one.
_LONGEST = 4


class TextStream:
    """The text of one answer. Without a tokenizer tokens pass at once, and their text is empty.

    `stopped` once one of the strings `stop` was written; the text ends before it. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, stop
        self._waiting: list[int] = []
        self._text = ""
        # Tokens whose text is not out yet: token, log-probability, and where it ends in `_text` (-1: not known yet).
        self._tokens: list[tuple[int, float, int]] = []
        self.stopped = False

    def push(self, token: int, logprob: float) -> TextDelta | None:
        """The next token; returns what may be shown now, if anything."""
        self._waiting.append(token)
        self._tokens.append((token, logprob, -1))
        self._read(last=False)
        # Characters at the end may be the beginning of a stop string: they are held back.
        sizes = (size for stop in self._stop for size in range(1, len(stop)) if self._text.endswith(stop[:size]))
        return self._cut() or self._release(len(self._text) - max(sizes, default=0))

    def flush(self) -> TextDelta | None:
        """The rest: nothing more comes, or speech comes in between."""
        self._read(last=True)
        return self._cut() or self._release(len(self._text))

    def _read(self, last: bool) -> None:
        """Appends the text of waiting tokens, if they are whole characters."""
        text = self._tokenizer.decode(self._waiting) if self._tokenizer and self._waiting else ""
        if text.endswith(_UNFINISHED) and len(self._waiting) < _LONGEST and not last:
            return
        # Tokens that make up one character end at the same place, so they leave together.
        self._waiting, self._text = [], self._text + text
        self._tokens = [(token, p, len(self._text) if end < 0 else end) for token, p, end in self._tokens]

    def _cut(self) -> TextDelta | None:
        found = [at for at in (self._text.find(stop) for stop in self._stop) if at >= 0]
        if not found:
            return None
        self.stopped, self._text = True, self._text[: min(found)]
        # The token in which the stop string begins counts as text where some of it is text.
        starts = [0, *(end for _, _, end in self._tokens[:-1])]
        kept = [token for token, start in zip(self._tokens, starts, strict=True) if start < len(self._text)]
        self._tokens = [(token, p, min(end, len(self._text))) for token, p, end in kept]
        return self._release(len(self._text))

    def _release(self, count: int) -> TextDelta | None:
        out = [token for token in self._tokens if 0 <= token[2] <= count]
        if not out:
            return None
        # Ends count from the beginning of the text that is left, so they move with what leaves.
        size = out[-1][2]
        text, self._text = self._text[:size], self._text[size:]
        self._tokens = [(token, p, end - size if end >= 0 else end) for token, p, end in self._tokens[len(out) :]]
        return TextDelta(text, tuple(token for token, _, _ in out), tuple(logprob for _, logprob, _ in out))


class Request:
    """The events of one answer, as they are made: `TextDelta`, `AudioCodes`, and `Finished` at the end.

    Whoever waits for the next one runs the engine meanwhile, for all requests. Several threads may each iterate their
    own. A request that is cancelled, closed or no longer referred to gives its slot back.
    """

    def __init__(self, active: "ActiveRequest", serve: Callable[["ActiveRequest"], None]):
        self._active, self._serve = active, serve
        # The engine knows the active request alone, so that this object can be collected.
        weakref.finalize(self, active.cancel).atexit = False

    def __iter__(self) -> "Request":
        return self

    def __next__(self) -> Event:
        """Raises RequestError (`failed`) when the engine could not go on with this request."""
        active = self._active
        while not active.events:
            # Events are there before `over` is set: look at them again, another thread may have ended the answer.
            if active.over and not active.events:
                raise StopIteration
            self._serve(active)
        event = active.events.popleft()
        if isinstance(event, RequestError):
            raise event
        return event

    def cancel(self) -> None:
        """Ends the answer; never waits. What was made so far is still there, then `Finished("cancelled")`."""
        self._active.cancel()

    close = cancel


class ActiveRequest:
    """One request inside the engine. `slot` is its row; `sequence` its tokens so far, pads where frames stand."""

    def __init__(
        self,
        prompt: Prompt,
        settings: GenerationConfig,
        key: UInt32[np.ndarray, "2"],
        tokens: SpecialTokens,
        tokenizer: Tokenizer | None,
    ):
        self.prompt, self.settings, self.key = prompt, settings, key
        self.size = len(prompt.tokens)
        self.slot = -1  # until it is admitted
        self.events: deque[Event | RequestError] = deque()
        self.over = self.cancelled = False
        self.tokens = self.frames = 0
        self._marks, self._text = tokens, TextStream(tokenizer, settings.stop)
        self._sequence: list[int] = []
        self._codes: list[np.ndarray] = []
        self._speaking = int(prompt.tokens[-1]) == tokens.audiogen_start
        self._began, self._first_token, self._first_frame = time.perf_counter(), None, None

    @property
    def started(self) -> bool:
        """Whether it has had anything of its answer."""
        return bool(self._sequence)

    def cancel(self) -> None:
        # No lock: this may run wherever an object is collected. The engine looks at it before each step.
        self.cancelled = True

    def fail(self, message: str) -> None:
        self.events.append(RequestError("failed", message))
        self.over = True

    def take(self, items: StepOutput, reason: int) -> None:
        """Makes events of a step's items (n, ..); ends when the row has (`reason`) or a stop string was written."""
        for kind, token, logprob, codes in zip(*(x.tolist() for x in items[:3]), items.codes, strict=True):
            if kind == OutputKind.NONE:
                break
            # The sequence in which an audio pad stands for a frame is what a later prompt would hold.
            self._sequence.append(self._marks.audio_pad if kind == OutputKind.FRAME else token)
            if kind == OutputKind.FRAME:
                self.frames += 1
                self._first_frame = self._first_frame or self._seconds()
                self._codes.append(codes)
            elif kind == OutputKind.TOKEN:
                self.tokens += 1
                self._first_token = self._first_token or self._seconds()
                self._emit(self._text.push(token, logprob))
            else:
                self._mark(token)
            # Only the host knows stop strings: what the device wrote behind one is dropped.
            if self._text.stopped:
                return self.finish("stop")
        # The frames of a call leave together, as one event.
        self._emit_frames(last=False)
        if reason:
            self.finish("end" if reason == FinishReason.END else "length")

    def finish(self, reason: str) -> None:
        """Ends the answer with all that was held back."""
        self._emit(self._text.flush())
        # A stretch that was cut off is closed, so that its decoder gives out what it holds back.
        if self._speaking and reason != "cancelled":
            self._emit_frames(last=True)
        if reason == "end" and self.settings.speech and self._sequence[-1] != self._marks.end_of_text:
            # The text ended before its last speech.
            self._sequence.append(self._marks.end_of_text)
        self._emit(
            Finished(
                finish_reason="stop" if self._text.stopped else reason,
                prompt=self.size,
                tokens=self.tokens,
                frames=self.frames,
                first_token=self._first_token,
                first_frame=self._first_frame,
                total=self._seconds(),
                sequence=np.concatenate([self.prompt.tokens, np.array(self._sequence, np.int32)]),
            )
        )
        self.over = True

    def _mark(self, token: int) -> None:
        if token == self._marks.audiogen_start:
            self._speaking = True
            self._emit(self._text.flush())
        elif token == self._marks.audiogen_end:
            self._emit_frames(last=True)
            self._speaking = False

    def _emit_frames(self, last: bool) -> None:
        if self._codes or last:
            levels = self.prompt.audio_codes.shape[1]
            self._emit(AudioCodes(np.array(self._codes, np.int32).reshape(-1, levels), last))
            self._codes = []

    def _emit(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)

    def _seconds(self) -> float:
        return time.perf_counter() - self._began
