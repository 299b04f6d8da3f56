"""Text to be spoken (TTS): a task prompt, a sentence of the text, its speech; loss on the speech."""

from argparse import ArgumentParser, Namespace
from functools import partial

from data_pipelines.document import Document
from data_pipelines.jobs import Job
from data_pipelines.prompt_writing import spoken_tag, trainable
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speaking import (
    Speaker,
    SpeechSettings,
    add_speech_arguments,
    sentences_of,
    speech_settings,
    text_alone,
)
from data_pipelines.synthesis.task_prompts import READ_ALOUD, choose_prompt
from data_pipelines.synthesis.units import manifest_job

NAME = "tts"


def add_arguments(parser: ArgumentParser) -> None:
    """The job's own options."""
    add_speech_arguments(parser)


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    settings = speech_settings(options)
    return manifest_job(NAME, partial(read_aloud, settings=settings), options, str(settings))


def read_aloud(document: Document, draft: Draft, settings: SpeechSettings) -> None:
    """Adds a document for each sentence of a text. Raises SampleError as `text_alone` and `Speaker`."""
    text = text_alone(document)
    speaker = Speaker.of(settings, document, draft, text)
    for sentence in sentences_of(text, settings):
        prompt = choose_prompt(READ_ALOUD, speaker.language, speaker.rng)
        draft.add(prompt + sentence.strip() + trainable(spoken_tag(speaker.say(sentence))), NAME)
