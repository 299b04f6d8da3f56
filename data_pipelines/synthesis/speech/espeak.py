"""Speech from eSpeak NG, which comes as a library with the `espeakng-loader` wheel (GPLv3, an extra)."""

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Int16

from baichuan_omni_jax.errors import ConfigError

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


def speak(text: str, voice: str, *, rate: int = 175, pitch: int = 50) -> Int16[np.ndarray, "t"]:
    """Speaks `text`: mono samples at `SAMPLE_RATE`, the same for the same arguments in every process.

    `voice` is an eSpeak name (`en-us`, `cmn+f2`, ...), `rate` in words a minute (80-450), `pitch` 0-100. Raises
    ConfigError when the wheel is not installed and SpeechError for an unknown voice or a text without sound.
    """
    global _server
    request = {"text": text, "voice": voice, "rate": rate, "pitch": pitch}
    with _lock:
        # A fork of the process that started it would mix its requests with that one's.
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

    def ask(self, request: dict) -> bytes:
        """The bytes of the samples. Raises SpeechError as it was answered; OSError when the process is gone."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        head = self.process.stdout.readline()
        if not head:
            raise OSError(f"exit code {self.process.wait()}")
        answer = json.loads(head)
        if "error" in answer:
            raise SpeechError(answer["error"])
        samples = self.process.stdout.read(answer["bytes"])
        if len(samples) < answer["bytes"]:
            raise OSError(f"exit code {self.process.wait()}")
        return samples

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


atexit.register(close)
