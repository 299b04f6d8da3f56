"""Speech from eSpeak NG, called through ctypes in the library that the `espeakng-loader` wheel carries.

The library holds one global state (voice, rate, callback), so calls are serialised by a lock; it is loaded at the
first use and stays loaded for the life of the process.
"""

import ctypes
import importlib
import threading

import numpy as np

from baichuan_omni_jax.config.errors import ConfigError

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3

SAMPLE_RATE = 22050
"""Hz; the rate of all eSpeak NG voices."""

VOICES = {
    "en": ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us+f1", "en-us+m3", "en+f4"),
    "zh": ("cmn", "cmn+f1", "cmn+m3", "cmn+f4"),
}
"""Voices by language. `cmn` is Mandarin; `+f1`, `+m3` are eSpeak's female and male variants of a voice.

Variants with breath (`+f2`, `+f3`, `+f5`) are left out: their noise is seeded by the clock, so no two builds are equal.
"""

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_lock = threading.Lock()
_engine: "_Engine | None" = None


class SpeechError(RuntimeError):
    """eSpeak NG refused a voice or a text."""


class _Engine:
    """The loaded library, its callback and the samples of the utterance being spoken."""

    def __init__(self):
        try:
            loader = importlib.import_module("espeakng_loader")
        except ImportError as error:
            raise ConfigError(
                "speech synthesis needs the espeakng-loader wheel: pip install baichuan_omni_jax[sample]"
            ) from error
        self.library = ctypes.CDLL(str(loader.get_library_path()))
        data_path = str(loader.get_data_path()).encode()
        rate = self.library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, _INITIALIZE_DONT_EXIT)
        if rate != SAMPLE_RATE:
            raise ConfigError(f"eSpeak NG could not be initialised with the data at {data_path.decode()}")
        self.library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self.chunks: list[np.ndarray] = []
        # C keeps only the address: without this reference the callback would be collected under its feet.
        self.callback = _Callback(self._receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        self.chunks.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SpeechError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(_RATE, rate, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        utf8 = text.encode("utf-8")
        status = self.library.espeak_Synth(utf8, len(utf8) + 1, 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status != 0 or self.library.espeak_Synchronize() != 0 or not self.chunks:
            raise SpeechError(f"eSpeak NG could not speak {text!r} with voice {voice!r}")
        return np.concatenate(self.chunks)


def synthesise(text: str, voice: str, *, rate: int = 175, pitch: int = 50) -> tuple[np.ndarray, int]:
    """Speaks `text`; returns mono int16 samples and their rate in Hz (22050).

    `voice` is an eSpeak name (`en-us`, `cmn+f2`, ...), `rate` in words a minute (80-450), `pitch` 0-100. Raises
    ConfigError when the wheel is not installed and SpeechError for an unknown voice or a text without sound.
    """
    global _engine
    with _lock:
        if _engine is None:
            _engine = _Engine()
        return _engine.speak(text, voice, rate, pitch), SAMPLE_RATE
