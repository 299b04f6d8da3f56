"""Hearing where somebody stops speaking: the sound of a microphone comes in pieces, whole utterances come out.

By loudness alone. A frame is voiced when it is louder than the noise floor by a set number of decibels; the floor is
what the quietest tenth of the last seconds stays under. An utterance ends when enough of it was voiced and then a
pause followed.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32


@dataclass(frozen=True, kw_only=True)
class PauseSettings:
    """Times in seconds, loudness in dB of full scale."""

    silence: float = 0.8
    """A pause this long ends an utterance."""
    speech: float = 0.2
    """Less voiced sound than this is no utterance: a click, a cough."""
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
    """Collects what is spoken at `rate` Hz, up to each pause. For one microphone; not thread-safe."""

    def __init__(self, rate: int, settings: PauseSettings | None = None):
        self.rate, self.settings = rate, settings or PauseSettings()
        self._size = max(1, round(rate * self.settings.frame))
        self._levels: deque[float] = deque(maxlen=self._count(self.settings.floor_seconds))
        self._rest = np.zeros(0, np.float32)
        self._forget(0)

    def push(self, samples: np.ndarray) -> list[Float32[np.ndarray, " n"]]:
        """The next samples (t,) or (t, channels), floats at full scale 1 or 16-bit integers.

        Returns the utterances whose pause was heard in them, nearly always none.
        """
        wave = np.concatenate([self._rest, _mono(samples)])
        whole = len(wave) // self._size * self._size
        self._rest = wave[whole:]
        return [said for frame in wave[:whole].reshape(-1, self._size) if (said := self._add(frame)) is not None]

    def close(self) -> Float32[np.ndarray, " n"] | None:
        """The utterance begun, when the microphone was switched off before its pause; None when nothing was said."""
        said = self._utterance() if self._voiced >= self._count(self.settings.speech) else None
        self._rest = np.zeros(0, np.float32)
        self._forget(0)
        return said

    def _add(self, frame: Float32[np.ndarray, " f"]) -> Float32[np.ndarray, " n"] | None:
        settings = self.settings
        self._frames.append(frame)
        if self._is_voiced(frame):
            self._voiced, self._end = self._voiced + 1, len(self._frames)
        paused = len(self._frames) - self._end >= self._count(settings.silence)
        said = None
        if self._voiced >= self._count(settings.speech):
            if not paused and len(self._frames) < self._count(settings.longest):
                return None
            said = self._utterance()
            self._frames = self._frames[self._end + self._count(settings.margin) :]
        elif self._voiced and not paused:
            return None
        self._forget(self._count(settings.margin))
        return said

    def _is_voiced(self, frame: Float32[np.ndarray, " f"]) -> bool:
        level = 10 * np.log10(np.mean(np.square(frame)) + 1e-10)
        self._levels.append(level)
        floor = np.clip(np.percentile(self._levels, 10), *self.settings.floor_range)
        return bool(level > floor + self.settings.above_floor)

    def _utterance(self) -> Float32[np.ndarray, " n"]:
        return np.concatenate(self._frames[: self._end + self._count(self.settings.margin)])

    def _forget(self, kept: int) -> None:
        """Nothing was said yet; the last `kept` frames may turn out to be those before the first voiced one."""
        self._frames: list[np.ndarray] = self._frames[-kept:] if kept else []
        self._voiced, self._end = 0, 0

    def _count(self, seconds: float) -> int:
        return max(1, round(seconds / self.settings.frame))


def _mono(samples: np.ndarray) -> Float32[np.ndarray, " t"]:
    """The mean of the channels, at full scale 1."""
    wave = samples.astype(np.float32) / (32768 if samples.dtype == np.int16 else 1)
    return wave.mean(1) if wave.ndim == 2 else wave
