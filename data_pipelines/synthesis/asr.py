"""Speech to be transcribed (ASR): a task prompt, a sentence of the text as speech, its words; loss on the words."""

from argparse import ArgumentParser, Namespace
from functools import partial

from data_pipelines.document import Document
from data_pipelines.jobs import Job
from data_pipelines.prompt_writing import heard_tag, trainable
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speaking import (
    Speaker,
    SpeechSettings,
    add_speech_arguments,
    sentences_of,
    speech_settings,
    text_alone,
)
from data_pipelines.synthesis.task_prompts import TRANSCRIBE, choose_prompt
from data_pipelines.synthesis.units import manifest_job

NAME = "asr"


def add_arguments(parser: ArgumentParser) -> None:
    """The job's own options."""
    add_speech_arguments(parser)


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    settings = speech_settings(options)
    return manifest_job(NAME, partial(transcribe, settings=settings), options, str(settings))


def transcribe(document: Document, draft: Draft, settings: SpeechSettings) -> None:
    """Adds a document for each sentence of a text. Raises SampleError as `text_alone` and `Speaker`."""
    text = text_alone(document)
    speaker = Speaker.of(settings, document, draft, text)
    for sentence in sentences_of(text, settings):
        prompt = choose_prompt(TRANSCRIBE, speaker.language, speaker.rng)
        draft.add(prompt + heard_tag(speaker.say(sentence)) + trainable(sentence.strip()), NAME)
