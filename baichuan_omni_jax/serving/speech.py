"""An answer's sound while it is being made, as one WAV file that a browser plays as it grows."""

import asyncio
import secrets
import struct
import threading
import time
from collections.abc import AsyncIterator

import numpy as np
from jaxtyping import Float32

POLL = 0.05  # seconds between looks for new sound: waiting for it must not hold one of the server's threads
UNKNOWN = 0xFFFFFFFF  # the length of a WAV file that is still growing


class GrowingSpeech:
    """Sound pushed in one thread and streamed from others, each from the beginning. `name` cannot be guessed."""

    def __init__(self, rate: int):
        self.name, self.rate = secrets.token_urlsafe(16), rate
        self._bytes = bytearray()
        self._whole, self._ends = False, 0.0
        self._lock = threading.Lock()

    def push(self, samples: Float32[np.ndarray, " n"]) -> None:
        """Adds mono samples at full scale 1; what is beyond it is clipped."""
        with self._lock:
            self._bytes += (np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes()
            self._ends = max(self._ends, time.monotonic()) + len(samples) / self.rate

    @property
    def sounds(self) -> bool:
        """Whether somebody who listens from the beginning still hears it now."""
        return time.monotonic() < self._ends

    def close(self) -> None:
        """Nothing follows: streams end."""
        with self._lock:
            self._whole = True

    def hush(self) -> None:
        """Nobody listens any more."""
        with self._lock:
            self._whole, self._ends = True, 0.0

    async def stream(self) -> AsyncIterator[bytes]:
        """The file's bytes: 16 bits, one channel."""
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
    """44 bytes before 16-bit mono samples of unknown number."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + struct.pack("<I", UNKNOWN) + b"WAVEfmt " + form + b"data" + struct.pack("<I", UNKNOWN)
