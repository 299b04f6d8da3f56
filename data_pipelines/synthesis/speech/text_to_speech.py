"""Text to speech: the interface, the included back end, and finding the user's own.

`--tts package.module:factory` names a callable without arguments that returns a `TextToSpeech`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import soxr

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.hooks import load_hook
from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE, SpeechError, check_installed, speak
from data_pipelines.synthesis.speech.voices import VOICES, parse_voice

RATES = (16000, 24000)
"""Hz a back end may speak at: the audio tokenizer's rate, the vocoder's."""
QUIET = 1e-3
"""Sound whose largest sample lies below this share of full scale holds no speech."""


@runtime_checkable
class TextToSpeech(Protocol):
    """A back end. The same arguments must give the same samples, in every process and in any order."""

    def voices(self, language: str) -> Sequence[str]:
        """Names of the voices that speak `language` ("en", "zh", ...); empty when none does."""

    def synthesise(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        """Mono samples (t,), float32 in [-1, 1] or int16, and their rate in Hz, 16000 or 24000.

        Raises SpeechError for a text or a voice that it cannot speak.
        """


class EspeakSpeech:
    """eSpeak NG, resampled to `rate` by soxr; its voices are named in `voices.py`.

    Raises ConfigError when its wheel is missing.
    """

    def __init__(self, rate: int):
        check_installed()
        self.rate = rate

    def voices(self, language: str) -> Sequence[str]:
        return VOICES.get(language, ())

    def synthesise(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        try:
            asked = parse_voice(voice, language)
        except ValueError as error:
            raise SpeechError(str(error)) from error
        samples = speak(text, asked.espeak, rate=asked.rate, pitch=asked.pitch)
        # In float32: soxr adds noise to 16-bit output, and not always the same.
        return soxr.resample(samples.astype(np.float32) / 32768, SAMPLE_RATE, self.rate), self.rate


INCLUDED = {"espeak": lambda: EspeakSpeech(16000), "espeak-24k": lambda: EspeakSpeech(24000)}
"""Back ends by the name that `--tts` takes."""


@lru_cache(maxsize=4)
def load_speech(name: str) -> TextToSpeech:
    """The back end called `name`: an included one, or what `package.module:factory` returns; made once a process.

    Raises ConfigError when there is none, or it lacks `voices` or `synthesise`.
    """
    if name in INCLUDED:
        return INCLUDED[name]()
    if ":" not in name:
        raise ConfigError(f"--tts {name}: neither {' nor '.join(INCLUDED)} nor of the form package.module:factory")
    return load_hook("--tts", name, "voices", "synthesise")


def voice_text(speech: TextToSpeech, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
    """Speech as int16 samples (t,), and its rate in Hz.

    Raises SampleError: "unspeakable" for what the back end refuses, "silent_audio" for an answer without sound. Raises
    ConfigError when the back end breaks the interface.
    """
    try:
        samples, rate = speech.synthesise(text, voice, language)
    except SpeechError as error:
        raise SampleError("unspeakable", str(error)) from error
    name = type(speech).__name__
    if rate not in RATES:
        raise ConfigError(f"{name} speaks at {rate} Hz: it must be {' or '.join(map(str, RATES))}")
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.int16):
        raise ConfigError(f"{name} gives {samples.dtype} of shape {samples.shape}: it must be (t,) float32 or int16")
    if samples.dtype == np.float32:
        if not np.isfinite(samples).all():
            raise SampleError("silent_audio", f"{name} gave samples that are not finite for {text!r}")
        samples = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    if np.abs(samples.astype(np.int32)).max(initial=0) < QUIET * 32767:
        raise SampleError("silent_audio", f"{name} gave no sound for {text!r} with voice {voice}")
    return samples, rate
