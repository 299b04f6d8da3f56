"""Speech from eSpeak NG, which comes as a library with the `espeakng-loader` wheel (GPLv3, an extra)."""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from jaxtyping import Int16

from baichuan_omni_jax.errors import ConfigError

LANGUAGES = ("en", "zh")
PITCHES = {"low": 35, "mid": 50, "high": 65}
"""eSpeak's pitch, 0-100."""
RATES = {"slow": 150, "medium": 175, "fast": 200}
"""Words a minute."""

_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-us-nyc")
_VARIANTS = ("plain", "m1", "m2", "m3", "m4", "m6", "m8", "f1", "f2", "f3", "f4")


@dataclass(frozen=True)
class EspeakVoice:
    """What eSpeak takes: its name for the voice, pitch 0-100, rate in words a minute."""

    espeak: str
    pitch: int
    rate: int


def _table() -> dict[str, tuple[str, ...]]:
    """Lists every variant twice in each language: once as it is, once low and fast or high and slow."""
    # Accents go round over the variants, so that no accent has all the high or all the low voices.
    english, chinese = [], []
    for place, variant in enumerate(_VARIANTS):
        changed = ("low/fast", "high/slow")[place % 2]
        for turn, manner in enumerate(("mid/medium", changed)):
            accent = _ACCENTS[(2 * place + turn) % len(_ACCENTS)]
            english.append(f"{accent}/{variant}/{manner}")
            chinese.append(f"cmn/{variant}/{manner}")
    return {"en": tuple(english), "zh": tuple(chinese)}


VOICES = _table()


def parse_voice(name: str, language: str) -> EspeakVoice:
    """Returns the voice called `name`. Raises ValueError when it has another form or speaks another language."""
    # Any name of the form, not only those of the list: a user may know other accents.
    parts = name.split("/")
    if len(parts) != 4 or parts[2] not in PITCHES or parts[3] not in RATES:
        raise ValueError(
            f"voice {name!r} is not ACCENT/VARIANT/PITCH/RATE with a pitch of {', '.join(PITCHES)} "
            f"and a rate of {', '.join(RATES)}"
        )
    accent, variant, pitch, rate = parts
    if (language == "zh") != accent.startswith("cmn"):
        raise ValueError(f"voice {name!r} does not speak {language!r}")
    return EspeakVoice(accent if variant == "plain" else f"{accent}+{variant}", PITCHES[pitch], RATES[rate])


SAMPLE_RATE = 22050
"""Hz; the rate of all eSpeak NG voices."""

_SERVER = Path(__file__).with_name("espeak_server.py")
_lock = threading.Lock()
_server: "_Server | None" = None


class SpeechError(RuntimeError):
    """A voice or a text that a back end refused."""


def check_installed() -> None:
    """Raises ConfigError when the wheel with the library is missing."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ConfigError("speech synthesis needs the espeakng-loader wheel: pip install espeakng-loader")


def speak(text: str, voice: str, *, rate: int = 175, pitch: int = 50) -> Int16[np.ndarray, " t"]:
    """Speaks `text`: mono samples at `SAMPLE_RATE`, the same for the same arguments in every process.

    Args:
        text: of any length; what has no letters is an error.
        voice: eSpeak's name, as `en-us` or `cmn+f1`.
        rate: words a minute, 80-450.
        pitch: 0-100.

    Raises:
        ConfigError: when the wheel is not installed.
        SpeechError: for an unknown voice, or a text that gives no audio.
    """
    global _server
    request = {"text": text, "voice": voice, "rate": rate, "pitch": pitch}
    with _lock:
        # A process that forked from the one that has the server needs its own: the pipes would be shared.
        if _server is None or _server.owner != os.getpid():
            _server = _Server()
        try:
            return np.frombuffer(_server.ask(request), np.int16)
        except OSError as error:
            _server = None
            raise SpeechError(f"the eSpeak NG process ended: {error}") from error


def close() -> None:
    """Ends the process that speaks; the next utterance starts another."""
    global _server
    with _lock:
        if _server is not None:
            _server.close()
        _server = None


class _Server:
    """The process that has the library loaded; it ends when its stdin closes, so it never outlives this one."""

    def __init__(self):
        check_installed()
        self.owner = os.getpid()
        command = [sys.executable, str(_SERVER)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Both are pipes; the types leave it open.
        self.stdin = cast(IO[bytes], self.process.stdin)
        self.stdout = cast(IO[bytes], self.process.stdout)

    def ask(self, request: dict) -> bytes:
        """Returns the bytes of the samples. Raises SpeechError as it was answered; OSError when the process is gone."""
        self.stdin.write(json.dumps(request).encode() + b"\n")
        self.stdin.flush()
        # Nothing comes when the process has died: its exit code says why.
        head = self.stdout.readline()
        if not head:
            raise OSError(f"exit code {self.process.wait()}")
        # An answer is a line of JSON, then as many bytes as it says; fewer mean that the process died on the way.
        answer = json.loads(head)
        if "error" in answer:
            raise SpeechError(answer["error"])
        samples = self.stdout.read(answer["bytes"])
        if len(samples) < answer["bytes"]:
            raise OSError(f"exit code {self.process.wait()}")
        return samples

    def close(self) -> None:
        if self.owner == os.getpid():
            self.stdin.close()
            self.process.wait()
            self.stdout.close()


atexit.register(close)
