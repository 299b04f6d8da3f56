"""What the jobs that speak have in common: their options, the text of a document, its speaker."""

import io
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import soundfile

from baichuan_omni_jax.config import READ_AT_LEAST
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import text_of
from data_pipelines.documents.prompts import Text, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speech.text_to_speech import INCLUDED, load_speech, voice_text
from data_pipelines.synthesis.speech.voices import LANGUAGES
from data_pipelines.synthesis.task_prompts import choose_prompt
from data_pipelines.text.languages import HAN, language_of
from data_pipelines.text.splitting import HAN_SECONDS, LONGEST, split_text, spoken_seconds
from data_pipelines.tokenizers.special_tokens import ASSISTANT, SYSTEM, USER


@dataclass(frozen=True)
class SpeechSettings:
    """Who speaks, and into what a text is cut. `voices` empty: all; `language` empty: what the text is in.

    A piece takes about `shortest` to `longest` seconds.
    """

    tts: str = "espeak"
    voices: tuple[str, ...] = ()
    language: str = ""
    shortest: float = READ_AT_LEAST
    longest: float = LONGEST
    seed: int = 0


def add_speech_arguments(parser: ArgumentParser) -> None:
    """The options that become `SpeechSettings`."""
    add, default = parser.add_argument, SpeechSettings()
    add("--tts", default=default.tts, help=f"{', '.join(INCLUDED)} or package.module:factory (default {default.tts})")
    add("--voices", metavar="NAME", nargs="+", default=(), help="draw from these alone (default: all it has)")
    add("--language", default="", help="what everything is spoken in (default: zh or en, by the text's script)")
    add("--shortest", metavar="SECONDS", type=float, default=default.shortest, help="of a piece (default %(default)s)")
    add("--longest", metavar="SECONDS", type=float, default=default.longest, help="of a piece (default %(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other voices and prompts (default 0)")


def speech_settings(options: Namespace) -> SpeechSettings:
    """Raises ConfigError for lengths that make no pieces, and for a back end or a voice that there is not."""
    settings = SpeechSettings(
        tts=options.tts,
        voices=tuple(options.voices),
        language=options.language,
        shortest=options.shortest,
        longest=options.longest,
        seed=options.seed,
    )
    if not 0 <= settings.shortest <= settings.longest or settings.longest < HAN_SECONDS:
        raise ConfigError(f"--shortest {settings.shortest} and --longest {settings.longest}: no piece is that long")
    speech = load_speech(settings.tts)
    languages = {settings.language} if settings.language else set(LANGUAGES)
    known = [voice for language in sorted(languages) for voice in speech.voices(language)]
    if not known:
        raise ConfigError(f"--tts {settings.tts} has no voice that speaks {settings.language or 'en or zh'}")
    for voice in settings.voices:
        if voice not in known:
            raise ConfigError(f"--voices {voice}: {settings.tts} has no such voice, but {', '.join(known)}")
    return settings


def text_alone(document: Document) -> str:
    """The text of a document that holds nothing else.

    Raises SampleError: "has_media"; "has_turns" for a conversation; "no_text" when there is nothing to speak;
    "bad_prompt".
    """
    elements = parse_prompt(document.text)
    if any(not isinstance(element, Text) for element in elements):
        raise SampleError("has_media", "only a document of text alone can be spoken")
    marks = "".join(element.text for element in elements if not element.plain)
    if any(role in marks for role in (SYSTEM, USER, ASSISTANT)):
        raise SampleError("has_turns", "a conversation is not read aloud")
    text = text_of(elements)
    if not spoken_seconds(text):
        raise SampleError("no_text", "there is nothing to speak in it")
    return text


def pieces_of(text: str, settings: SpeechSettings) -> list[str]:
    """The text cut at any punctuation; the pieces joined are the text."""
    return split_text(text, settings.shortest, settings.longest)


def sentences_of(text: str, settings: SpeechSettings) -> list[str]:
    """The text cut where sentences end, long sentences also within; the pieces joined are the text."""
    return split_text(text, settings.shortest, settings.longest, sentences=True)


@dataclass
class Speaker:
    """Speaks the pieces of one document, into its draft, with one voice for each language.

    Which voice is drawn by the seed and the document's id: it does not depend on other documents.
    """

    settings: SpeechSettings
    draft: Draft
    language: str
    rng: random.Random
    _voices: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: SpeechSettings, document: Document, draft: Draft, text: str) -> "Speaker":
        """The speaker of a document with this text. Raises SampleError "unknown_language"."""
        language = settings.language or language_of(text)
        if not language:
            raise SampleError("unknown_language", "it is neither Chinese nor English; --language says what to speak")
        return cls(settings, draft, language, random.Random(f"{settings.seed}/{draft.name}/{document.id}"))

    def say(self, text: str) -> str:
        """Speaks `text`; returns the path of a FLAC file. Raises SampleError as `voice_text`, and "no_voice"."""
        language = self.language
        if not self.settings.language and HAN.search(text):
            language = "zh"
        if language not in self._voices:
            self._voices[language] = self.rng.choice(self._choices(language))
        samples, rate = voice_text(load_speech(self.settings.tts), text.strip(), self._voices[language], language)
        return self.draft.save(_encode(samples, rate), ".flac")

    def _choices(self, language: str) -> list[str]:
        voices = load_speech(self.settings.tts).voices(language)
        chosen = [voice for voice in voices if not self.settings.voices or voice in self.settings.voices]
        if not chosen:
            raise SampleError("no_voice", f"none of the voices asked for speaks {language!r}")
        return chosen


def spoken_sentences(
    document: Document, draft: Draft, settings: SpeechSettings, prompts: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str, str]]:
    """Each sentence of a text: a task prompt in its language, its words, the path of its speech.

    Raises SampleError as `text_alone` and `Speaker`.
    """
    text = text_alone(document)
    speaker = Speaker.of(settings, document, draft, text)
    for sentence in sentences_of(text, settings):
        prompt = choose_prompt(prompts, speaker.language, speaker.rng)
        yield prompt, sentence.strip(), speaker.say(sentence)


def _encode(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
