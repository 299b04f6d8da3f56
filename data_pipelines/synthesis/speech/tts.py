"""Text to be spoken (TTS): a task prompt, a sentence of the text, its speech; loss on the speech."""

from argparse import Namespace
from functools import partial

from data_pipelines.datasets.jobs import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import spoken_tag, trainable
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speech.speaking import (
    SpeechSettings,
    add_speech_arguments,
    speech_settings,
    spoken_sentences,
)
from data_pipelines.synthesis.task_prompts import READ_ALOUD
from data_pipelines.synthesis.units import manifest_job

NAME = "tts"
add_arguments = add_speech_arguments


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    settings = speech_settings(options)
    return manifest_job(NAME, partial(read_aloud, settings=settings), options, str(settings))


def read_aloud(document: Document, draft: Draft, settings: SpeechSettings) -> None:
    """Adds a document for each sentence of a text. Raises SampleError as `spoken_sentences`."""
    for prompt, words, path in spoken_sentences(document, draft, settings, READ_ALOUD):
        draft.add(prompt + words + trainable(spoken_tag(path)), NAME)
