"""Audio of the page: a microphone's pieces become utterances, and an answer becomes a WAV file that grows.

Utterances end at pauses, which are found by loudness alone. A frame is voiced when it is louder than the noise floor by
a set number of decibels; the floor is what the quietest tenth of the last seconds stays under. An utterance ends when
enough of it was voiced and then a pause followed.
"""

import asyncio
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

POLL = 0.05  # seconds between looks for new samples: waiting for them must not hold one of the server's threads
UNKNOWN = 0xFFFFFFFF  # the length of a WAV file that is still growing


@dataclass(frozen=True, kw_only=True)
class PauseSettings:
    """Times in seconds, loudness in dB of full scale."""

    silence: float = 0.8
    """A pause this long ends an utterance."""
    speech: float = 0.2
    """Less voiced audio than this is no utterance: a click, a cough."""
    margin: float = 0.3
    """What is kept before the first voiced frame and after the last one."""
    longest: float = 30.0
    """An utterance ends here, pause or not."""
    above_floor: float = 12.0
    """dB above the noise floor from which a frame is voiced."""
    floor_seconds: float = 3.0
    """The noise floor is that of so many seconds past."""
    floor_range: tuple[float, float] = (-60.0, -35.0)
    """dB in which the floor is taken to lie, so that neither digital silence nor speech from the start misleads."""
    frame: float = 0.02


class PauseDetector:
    """Cuts the audio of one microphone at `rate` Hz into utterances, at each pause. Not thread-safe."""

    def __init__(self, rate: int, settings: PauseSettings | None = None):
        self.rate, self.settings = rate, settings or PauseSettings()
        self._size = max(1, round(rate * self.settings.frame))
        self._levels: deque[float] = deque(maxlen=self._count(self.settings.floor_seconds))
        self._rest = np.zeros(0, np.float32)
        self._forget(0)

    def push(self, samples: np.ndarray) -> list[Float32[np.ndarray, " n"]]:
        """Takes the next samples (t,) or (t, channels), floats at full scale 1 or 16-bit integers.

        Returns the utterances whose pause lies in them, nearly always none.
        """
        # Whole frames; what is left over begins the next piece.
        wave = np.concatenate([self._rest, _mono(samples)])
        whole = len(wave) // self._size * self._size
        self._rest = wave[whole:]
        frames = wave[:whole].reshape(-1, self._size)
        return [utterance for frame in frames if (utterance := self._add(frame)) is not None]

    def close(self) -> Float32[np.ndarray, " n"] | None:
        """Ends the audio, perhaps before a pause: returns the utterance begun; None when there is none."""
        utterance = self._utterance() if self._voiced >= self._count(self.settings.speech) else None
        self._rest = np.zeros(0, np.float32)
        self._forget(0)
        return utterance

    def _add(self, frame: Float32[np.ndarray, " f"]) -> Float32[np.ndarray, " n"] | None:
        # A frame is kept whether voiced or not: an utterance has breaths in it.
        settings = self.settings
        self._frames.append(frame)
        if self._is_voiced(frame):
            self._voiced, self._end = self._voiced + 1, len(self._frames)
        paused = len(self._frames) - self._end >= self._count(settings.silence)
        utterance = None
        if self._voiced >= self._count(settings.speech):
            # Enough was voiced: an utterance, which a pause or its length ends.
            if not paused and len(self._frames) < self._count(settings.longest):
                return None
            utterance = self._utterance()
            self._frames = self._frames[self._end + self._count(settings.margin) :]
        elif self._voiced and not paused:
            return None
        # Silence, or a click that a pause followed: only the margin before the next voiced frame is kept.
        self._forget(self._count(settings.margin))
        return utterance

    def _is_voiced(self, frame: Float32[np.ndarray, " f"]) -> bool:
        level = 10 * np.log10(np.mean(np.square(frame)) + 1e-10)
        self._levels.append(level)
        floor = np.clip(np.percentile(self._levels, 10), *self.settings.floor_range)
        return bool(level > floor + self.settings.above_floor)

    def _utterance(self) -> Float32[np.ndarray, " n"]:
        return np.concatenate(self._frames[: self._end + self._count(self.settings.margin)])

    def _forget(self, kept: int) -> None:
        """Begins anew; the last `kept` frames may turn out to be those before the first voiced one."""
        self._frames: list[np.ndarray] = self._frames[-kept:] if kept else []
        self._voiced, self._end = 0, 0

    def _count(self, seconds: float) -> int:
        return max(1, round(seconds / self.settings.frame))


def _mono(samples: np.ndarray) -> Float32[np.ndarray, " t"]:
    """Returns the mean of the channels, at full scale 1."""
    wave = samples.astype(np.float32) / (32768 if samples.dtype == np.int16 else 1)
    return wave.mean(1) if wave.ndim == 2 else wave


class SpeechWave:
    """An answer's speech, pushed in one thread and streamed from others, each from the beginning, as a WAV file.

    `name` cannot be guessed; `rate` is in Hz.
    """

    def __init__(self, rate: int):
        self.name, self.rate = secrets.token_urlsafe(16), rate
        self._bytes = bytearray()
        self._whole, self._ends = False, 0.0
        self._lock = threading.Lock()

    def push(self, samples: Float32[np.ndarray, " n"]) -> None:
        """Adds mono samples at full scale 1; what is beyond it is clipped."""
        with self._lock:
            self._bytes += (np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes()
            # When a listener who keeps up has reached the end: later samples begin no earlier than now.
            self._ends = max(self._ends, time.monotonic()) + len(samples) / self.rate

    @property
    def playing(self) -> bool:
        """Whether somebody who listens from the beginning still hears it now."""
        return time.monotonic() < self._ends

    def close(self) -> None:
        """Marks the end: streams end after what was pushed."""
        with self._lock:
            self._whole = True

    def mute(self) -> None:
        """Ends it for listeners who stopped it: nobody hears it any more."""
        with self._lock:
            self._whole, self._ends = True, 0.0

    async def stream(self) -> AsyncIterator[bytes]:
        """Yields the file's bytes: 16 bits, one channel."""
        yield wav_header(self.rate)
        sent = 0
        while True:
            with self._lock:
                new, whole = bytes(self._bytes[sent:]), self._whole
            if new:
                sent += len(new)
                yield new
            elif whole:
                return
            else:
                await asyncio.sleep(POLL)


def wav_header(rate: int) -> bytes:
    """Returns the 44 bytes before 16-bit mono samples of unknown number."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + struct.pack("<I", UNKNOWN) + b"WAVEfmt " + form + b"data" + struct.pack("<I", UNKNOWN)
