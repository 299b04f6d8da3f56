"""A back end of text to speech that needs no synthesizer: `--tts tests.helpers.fake_speech:make`."""

import hashlib

import numpy as np

from data_pipelines.synthesis.speech.espeak import SpeechError


class ToneSpeech:
    """A tone for each text and voice, 50 ms a character. Speaks English and Martian; refuses to say "shibboleth"."""

    rate = 24000

    def voices(self, language: str) -> tuple[str, ...]:
        return {"en": ("deep", "shrill"), "mars": ("Bork",)}.get(language, ())

    def synthesize(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        if "shibboleth" in text:
            raise SpeechError("cannot say shibboleth")
        digest = hashlib.sha256(f"{voice} {text}".encode()).digest()
        times = np.arange(int(0.05 * len(text) * self.rate)) / self.rate
        return (0.5 * np.sin(2 * np.pi * (200 + digest[0]) * times)).astype(np.float32), self.rate


def make() -> ToneSpeech:
    return ToneSpeech()


class BrokenSpeech(ToneSpeech):
    """Answers as no back end may, in the way that the text names."""

    def synthesize(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        wave = np.full(4800, 0.5, np.float32)
        return {
            "rate": (wave, 44100),
            "stereo": (wave.reshape(-1, 2), 24000),
            "double": (wave.astype(np.float64), 24000),
            "nan": (wave * np.nan, 24000),
            "silence": (wave * 0, 24000),
            "nothing": (wave[:0], 24000),
        }[text]


def break_down() -> ToneSpeech:
    raise RuntimeError("no model")


def make_nothing() -> object:
    return object()


class OldSpeech:
    """Has the method of version 0.1 alone."""

    def voices(self, language: str) -> tuple[str, ...]:
        return ("deep",)

    def synthesise(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        return np.zeros(1600, np.float32), 16000
