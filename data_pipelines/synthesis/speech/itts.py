"""Text and its speech in turns (ITTS): text_1 audio_1 text_2 audio_2 ..., loss on all but the first text.

A text is cut at punctuation; every piece is written, then spoken.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

from data_pipelines.datasets.jobs import Job
from data_pipelines.documents.prompt_writing import Source, spoken_answer, spoken_tag, trainable
from data_pipelines.synthesis.speech.alternating import add_arguments, alternating_job

NAME = "itts"
__all__ = ["NAME", "add_arguments", "make_job", "write_itts"]


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    return alternating_job(NAME, write_itts, options)


def write_itts(pieces: Sequence[str], say: Callable[[str], str]) -> Source:
    """The prompt of one or more pieces; `say` speaks one and returns the path."""
    first, *others = pieces
    return first + trainable(spoken_tag(say(first)) + spoken_answer(others, say))
