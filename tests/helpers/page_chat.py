"""A chat of scripted answers for the tests of the page: as slow as wanted, it says what it was asked."""

import threading
from dataclasses import dataclass

import numpy as np

from baichuan_omni_jax.config import GenerationConfig, tiny
from baichuan_omni_jax.generation.chat import ChatModel, OmniChat
from baichuan_omni_jax.generation.events import AudioCodes, Finished, TextDelta
from tests.helpers.engine_prompts import TestPrompt

RATE = 24000
HOP = 1920  # samples of a code frame


@dataclass(frozen=True)
class Asked(TestPrompt):
    """A prompt that knows what it says."""

    text: str = ""


class Request:
    """Says "heard" and what it was asked, word by word, `pace` seconds each; aloud, half a second of sound first."""

    def __init__(self, prompt: str, settings: GenerationConfig, pace: float):
        self.words = ["heard", *prompt.split()]
        self.settings, self.pace = settings, pace
        self.cancelled = threading.Event()

    def __iter__(self):
        if self.settings.speech:
            yield AudioCodes(np.zeros((6, tiny().audio.levels), np.int32), True)
        for count, word in enumerate(self.words):
            if self.cancelled.wait(self.pace):
                break
            yield TextDelta(f"{word} ", (count,), (0.0,))
        reason = "cancelled" if self.cancelled.is_set() else "end"
        yield Finished(reason, 3, len(self.words), 6, 0.1, 0.2, 1.0, np.zeros(0, np.int32))

    def cancel(self):
        self.cancelled.set()


class Engine:
    """Keeps all requests."""

    def __init__(self, pace: float):
        self.pace, self.requests = pace, []

    def submit(self, prompt, settings, key):
        if prompt.text == "break":
            raise OSError("the engine broke")
        self.requests.append(Request(prompt.text, settings, self.pace))
        return self.requests[-1]


class FakeSpeechDecoder:
    """A tone."""

    rate, vocoder = RATE, "griffin_lim"

    def stream(self):
        return self

    def push(self, codes, last=False):
        return np.sin(np.arange(len(codes) * HOP) * (2 * np.pi * 330 / RATE)).astype(np.float32) / 8

    def close(self):
        return np.zeros(0, np.float32)


class Processor:
    """The texts of the user's messages, and the kinds of their media."""

    def encode_messages(self, messages, spoken=False, voice=""):
        parts = [part for message in messages if message["role"] == "user" for part in message["content"]]
        text = " ".join(part.get("text", part["type"]) for part in parts)
        return Asked(np.zeros(1, np.int32), text=text)

    def encode_content(self, content, speak=False):
        raise NotImplementedError

    def sentences(self, text):
        raise NotImplementedError


def scripted_chat(pace: float = 0.0) -> OmniChat:
    return OmniChat(ChatModel(Engine(pace), tiny(), FakeSpeechDecoder()), Processor())
