"""What INTLV and ITTS have in common: a text is cut into pieces, and documents of some of them are written."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import Source
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speech.speaking import (
    Speaker,
    SpeechSettings,
    add_speech_arguments,
    pieces_of,
    speech_settings,
    text_alone,
)
from data_pipelines.synthesis.units import manifest_job

FEWEST = 3  # pieces that `--pieces` may ask for: then none is ever left alone

# The prompt of some pieces, 2 or more; the function it is given speaks a piece and returns the path.
Writer = Callable[[Sequence[str], Callable[[str], str]], Source]


def add_arguments(parser: ArgumentParser) -> None:
    """The options of both jobs."""
    add_speech_arguments(parser)
    parser.add_argument("--pieces", metavar="N", type=int, default=32, help="at most, of a document (default 32)")


def alternating_job(name: str, write: Writer, options: Namespace) -> Job:
    """The job of `options` whose documents are written by `write`. Raises ConfigError."""
    settings = speech_settings(options)
    if options.pieces < FEWEST:
        raise ConfigError(f"--pieces {options.pieces} must be at least {FEWEST}")
    maker = partial(alternate, write=write, settings=settings, size=options.pieces)
    return manifest_job(name, maker, options, f"{settings} {options.pieces}")


def alternate(document: Document, draft: Draft, write: Writer, settings: SpeechSettings, size: int) -> None:
    """Adds the documents of a text, of at most `size` pieces each.

    Raises SampleError: "too_short" for a text of one piece, and as `text_alone` and `Speaker`.
    """
    text = text_alone(document)
    pieces = pieces_of(text, settings)
    if len(pieces) < 2:
        raise SampleError("too_short", "it is one piece, so nothing would alternate")
    speaker = Speaker.of(settings, document, draft, text)
    for group in group_pieces(pieces, size):
        draft.add(write(group, speaker.say), draft.name)


def group_pieces(pieces: Sequence[str], size: int) -> list[Sequence[str]]:
    """At most `size` (>= 3) pieces at a time, as even as can be, so that of two or more none is left alone.

    >>> group_pieces("abcdefg", 3)
    ['abc', 'de', 'fg']
    """
    count = -(-len(pieces) // size)
    bounds = [-(-len(pieces) * place // count) for place in range(count + 1)]
    return [pieces[start:end] for start, end in pairwise(bounds)]
