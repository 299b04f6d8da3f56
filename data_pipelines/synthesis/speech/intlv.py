"""Speech and text in turns (INTLV): audio_1 text_2 audio_3 text_4 ..., loss on the text alone.

A text is cut at punctuation; the pieces are heard and written in turns. A last piece that nothing would follow is
written behind the one before.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence

from data_pipelines.datasets.jobs import Job
from data_pipelines.documents.prompt_writing import Source, heard_tag, join, trainable
from data_pipelines.synthesis.speech.alternating import add_arguments, alternating_job

NAME = "intlv"
__all__ = ["NAME", "add_arguments", "make_job", "write_intlv"]


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    return alternating_job(NAME, write_intlv, options)


def write_intlv(pieces: Sequence[str], say: Callable[[str], str]) -> Source:
    """The prompt of two or more pieces; `say` speaks one and returns the path."""
    heard, written = list(pieces[::2]), list(pieces[1::2])
    if len(heard) > len(written):
        written[-1] += heard.pop()
    turns = zip(heard, written, strict=True)
    return join(heard_tag(say(first)) + trainable(second) for first, second in turns)
