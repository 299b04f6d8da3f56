"""Speech for documents: back ends of text to speech, the options of tasks that speak, the speaker of a document.

`--tts package.module:factory` names a callable without arguments that returns a `TextToSpeech`.
"""

import io
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
import soundfile
import soxr

from baichuan_omni_jax.config import READ_AT_LEAST
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import choose_prompt, text_of
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.speech.espeak import (
    LANGUAGES,
    SAMPLE_RATE,
    VOICES,
    SpeechError,
    check_installed,
    parse_voice,
    speak,
)
from data_pipelines.synthesis.units import Draft
from data_pipelines.text.spoken_text import HAN, HAN_SECONDS, LONGEST, language_of, split_text, spoken_seconds
from data_pipelines.tokenizers.tokenizer import ASSISTANT, SYSTEM, USER
from data_pipelines.tools.commands import load_hook

RATES = (16000, 24000)
"""Hz a back end may speak at: the audio tokenizer's rate, the vocoder's."""
QUIET = 1e-3
"""Audio whose largest sample lies below this share of full scale holds no speech."""


@runtime_checkable
class TextToSpeech(Protocol):
    """A back end. The same arguments must give the same samples, in every process and in any order."""

    def voices(self, language: str) -> Sequence[str]:
        """Returns the names of the voices that speak `language` ("en", "zh", ...); empty when none does."""
        ...

    def synthesize(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        """Returns mono samples (t,), float32 in [-1, 1] or int16, and their rate in Hz, 16000 or 24000.

        Raises SpeechError for a text or a voice that it cannot speak.
        """
        ...


class EspeakSpeech:
    """eSpeak NG, resampled to `rate` by soxr; its voices are named in `espeak.py`.

    Raises ConfigError when its wheel is missing.
    """

    def __init__(self, rate: int):
        check_installed()
        self.rate = rate

    def voices(self, language: str) -> Sequence[str]:
        return VOICES.get(language, ())

    def synthesize(self, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
        try:
            # A voice of another language would speak, and wrongly: it is refused.
            known = parse_voice(voice, language)
        except ValueError as error:
            raise SpeechError(str(error)) from error
        samples = speak(text, known.espeak, rate=known.rate, pitch=known.pitch)
        # In float32: soxr adds noise to 16-bit output, and not always the same.
        return soxr.resample(samples.astype(np.float32) / 32768, SAMPLE_RATE, self.rate), self.rate


INCLUDED = {"espeak": lambda: EspeakSpeech(16000), "espeak-24k": lambda: EspeakSpeech(24000)}
"""Back ends by the name that `--tts` takes."""


@lru_cache(maxsize=4)
def load_speech(name: str) -> TextToSpeech:
    """Loads the back end called `name`: an included one, or what `package.module:factory` returns; made once a process.

    Raises ConfigError when there is none, or it lacks `voices` or `synthesize`.
    """
    if name in INCLUDED:
        return INCLUDED[name]()
    if ":" not in name:
        raise ConfigError(f"--tts {name}: neither {' nor '.join(INCLUDED)} nor of the form package.module:factory")
    return load_hook("--tts", name, "voices", "synthesize")


def voice_text(speech: TextToSpeech, text: str, voice: str, language: str) -> tuple[np.ndarray, int]:
    """Speaks a text and checks what the back end answers.

    Args:
        speech: the back end.
        text: what is spoken.
        voice: one of the back end's voices.
        language: the language of the text: "en", "zh", ...

    Returns:
        Samples (t,), int16, and their rate in Hz.

    Raises:
        SampleError: "unspeakable" for what the back end refuses, "silent_audio" for an answer without sound.
        ConfigError: when the back end breaks the interface.
    """
    try:
        samples, rate = speech.synthesize(text, voice, language)
    except SpeechError as error:
        raise SampleError("unspeakable", str(error)) from error
    # A user's program: what it may not answer is refused by its name.
    name = type(speech).__name__
    if rate not in RATES:
        raise ConfigError(f"{name} speaks at {rate} Hz: it must be {' or '.join(map(str, RATES))}")
    if samples.ndim != 1 or samples.dtype not in (np.float32, np.int16):
        raise ConfigError(f"{name} gives {samples.dtype} of shape {samples.shape}: it must be (t,) float32 or int16")
    # Both forms become int16: what is stored is what was checked.
    if samples.dtype == np.float32:
        if not np.isfinite(samples).all():
            raise SampleError("silent_audio", f"{name} gave samples that are not finite for {text!r}")
        samples = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
    # In int32: the absolute value of -32768 does not fit 16 bits.
    if np.abs(samples.astype(np.int32)).max(initial=0) < QUIET * 32767:
        raise SampleError("silent_audio", f"{name} gave no sound for {text!r} with voice {voice}")
    return samples, rate


@dataclass(frozen=True)
class SpeechConfig:
    """Who speaks, and into what a text is cut."""

    tts: str = "espeak"
    """The back end: one of `INCLUDED` or `package.module:factory`."""
    voices: tuple[str, ...] = ()
    """Voices to draw from; empty: all that speak the language."""
    language: str = ""
    """What everything is spoken in; empty: what the text is in."""
    shortest: float = READ_AT_LEAST
    """Seconds that a piece takes at least, about."""
    longest: float = LONGEST
    """Seconds that a piece takes at most, about."""
    seed: int = 0
    """Another seed draws other voices and prompts."""


def add_speech_arguments(parser: ArgumentParser) -> None:
    """Adds the options that become `SpeechConfig`."""
    add, default = parser.add_argument, SpeechConfig()
    add("--tts", default=default.tts, help=f"{', '.join(INCLUDED)} or package.module:factory (default {default.tts})")
    add("--voices", metavar="NAME", nargs="+", default=(), help="draw from these alone (default: all it has)")
    add("--language", default="", help="what everything is spoken in (default: zh or en, by the text's script)")
    add("--shortest", metavar="SECONDS", type=float, default=default.shortest, help="of a piece (default %(default)s)")
    add("--longest", metavar="SECONDS", type=float, default=default.longest, help="of a piece (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other voices and prompts (default 0)")


def speech_config(options: Namespace) -> SpeechConfig:
    """Reads the options. Raises ConfigError for lengths that make no pieces, and for a back end or a voice that
    there is not.
    """
    config = SpeechConfig(
        tts=options.tts,
        voices=tuple(options.voices),
        language=options.language,
        shortest=options.shortest,
        longest=options.longest,
        seed=options.seed,
    )
    if not 0 <= config.shortest <= config.longest or config.longest < HAN_SECONDS:
        raise ConfigError(f"--shortest {config.shortest} and --longest {config.longest}: no piece is that long")
    # Voices are checked before anything is spoken: a job over 10^6 documents must not end at the first of them.
    speech = load_speech(config.tts)
    languages = {config.language} if config.language else set(LANGUAGES)
    known = [voice for language in sorted(languages) for voice in speech.voices(language)]
    if not known:
        raise ConfigError(f"--tts {config.tts} has no voice that speaks {config.language or 'en or zh'}")
    for voice in config.voices:
        if voice not in known:
            raise ConfigError(f"--voices {voice}: {config.tts} has no such voice, but {', '.join(known)}")
    return config


def text_alone(document: Document) -> str:
    """Returns the text of a document of text alone.

    Raises SampleError: "has_media"; "has_turns" for a conversation; "no_text" when there is nothing to speak;
    "bad_prompt".
    """
    elements = parse_prompt(document.text)
    # Media have a place in the text that speech could not keep.
    texts = [element for element in elements if isinstance(element, TextElement)]
    if len(texts) < len(elements):
        raise SampleError("has_media", "only a document of text alone can be spoken")
    # Roles are marks where somebody wrote a prompt, text where they are escaped.
    marks = "".join(element.text for element in texts if not element.plain)
    if any(role in marks for role in (SYSTEM, USER, ASSISTANT)):
        raise SampleError("has_turns", "a conversation is not spoken as one text")
    text = text_of(elements)
    if not spoken_seconds(text):
        raise SampleError("no_text", "there is nothing to speak in it")
    return text


def pieces_of(text: str, config: SpeechConfig) -> list[str]:
    """Cuts a text at any punctuation; the pieces joined are the text."""
    return split_text(text, config.shortest, config.longest)


def sentences_of(text: str, config: SpeechConfig) -> list[str]:
    """Cuts a text where sentences end, long sentences also within; the pieces joined are the text."""
    return split_text(text, config.shortest, config.longest, sentences=True)


@dataclass
class DocumentSpeaker:
    """Speaks the pieces of one document, into its draft, with one voice for each language.

    Which voice is drawn by the seed and the document's id: it does not depend on other documents.
    """

    config: SpeechConfig
    draft: Draft
    language: str
    rng: random.Random
    _voices: dict[str, str] = field(default_factory=dict)

    @classmethod
    def for_document(cls, config: SpeechConfig, document: Document, draft: Draft, text: str) -> "DocumentSpeaker":
        """Makes the speaker of a document.

        Args:
            config: who speaks.
            document: whose id, with the seed, decides the voices.
            draft: where the speech goes.
            text: of the document; its script decides the language where `config` names none.

        Raises:
            SampleError: "unknown_language".
        """
        language = config.language or language_of(text)
        if not language:
            raise SampleError("unknown_language", "it is neither Chinese nor English; --language says what to speak")
        return cls(config, draft, language, random.Random(f"{config.seed}/{draft.name}/{document.id}"))

    def say(self, text: str) -> str:
        """Speaks `text`; returns the path of a FLAC file. Raises SampleError as `voice_text`, and "no_voice"."""
        # A piece in Chinese characters of an English text is spoken by a Chinese voice, unless the options say
        # otherwise.
        language = self.language
        if not self.config.language and HAN.search(text):
            language = "zh"
        # Drawn once: all pieces of a document in one language are one speaker.
        if language not in self._voices:
            voices = load_speech(self.config.tts).voices(language)
            chosen = [voice for voice in voices if not self.config.voices or voice in self.config.voices]
            if not chosen:
                raise SampleError("no_voice", f"none of the chosen voices speaks {language!r}")
            self._voices[language] = self.rng.choice(chosen)
        samples, rate = voice_text(load_speech(self.config.tts), text.strip(), self._voices[language], language)
        # FLAC: half of WAV, and sample for sample the same.
        file = io.BytesIO()
        soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
        return self.draft.save(file.getvalue(), ".flac")


def spoken_sentences(
    document: Document, draft: Draft, config: SpeechConfig, prompts: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, str]]:
    """Speaks each sentence of a text.

    Args:
        document: text alone.
        draft: where the speech goes.
        config: who speaks, and into what the text is cut.
        prompts: task prompts by language, of which each sentence gets one.

    Yields:
        A task prompt in the language of the text, the words of the sentence, the path of its speech.

    Raises:
        SampleError: as `text_alone` and `DocumentSpeaker`.
    """
    text = text_alone(document)
    speaker = DocumentSpeaker.for_document(config, document, draft, text)
    for sentence in sentences_of(text, config):
        prompt = choose_prompt(prompts, speaker.language, speaker.rng)
        yield prompt, sentence.strip(), speaker.say(sentence)
