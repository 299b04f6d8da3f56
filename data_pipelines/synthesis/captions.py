"""Captions of images by a program of the user's: a caption document for every image and language.

`--captioner package.module:factory` names a callable without arguments that returns a `Captioner`.
"""

import random
from argparse import ArgumentParser, Namespace
from dataclasses import astuple, dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipelines.datasets.jobs.job import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import image_tag, turn
from data_pipelines.documents.prompts import ImageElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.images import decode_image
from data_pipelines.media.location import Media, find_media
from data_pipelines.synthesis.units import Draft, SynthesisTask, manifest_job
from data_pipelines.tools.commands import load_hook

NAME = "captions"

DESCRIBE_IMAGE = {
    "en": (
        "Describe the picture.",
        "Describe this image in one or two sentences.",
        "What can be seen in the picture?",
        "Write a caption for this photo.",
        "Give a detailed description of the image.",
    ),
    "zh": (
        "描述这张图片。",
        "用一两句话描述这张图。",
        "图片里有什么？",
        "为这张照片写一句说明。",
        "详细描述这张图片的内容。",
    ),
}


@runtime_checkable
class Captioner(Protocol):
    """What writes captions. The same arguments should give the same caption, in every process and in any order."""

    def caption(self, image: np.ndarray, prompt: str, language: str) -> str:
        """Returns a caption of `image`, RGB uint8 (height, width, 3), as `prompt` wants it, in `language`
        ("en", "zh").
        """
        ...


@dataclass(frozen=True)
class CaptionConfig:
    """Which captioner, in which languages; `seed` chooses the prompts."""

    captioner: str
    languages: tuple[str, ...] = ("en", "zh")
    seed: int = 0


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the task's own options."""
    add = parser.add_argument
    add("--captioner", metavar="MODULE:FACTORY", required=True, help="what returns an object with a method caption")
    add(
        "--languages",
        nargs="+",
        choices=tuple(DESCRIBE_IMAGE),
        default=tuple(DESCRIBE_IMAGE),
        help="a caption in each (en zh)",
    )
    add("--seed", type=int, default=0, help="another seed chooses other prompts (default 0)")


def make_job(options: Namespace) -> Job:
    """Makes the job of `options`. Raises ConfigError when the captioner cannot be loaded."""
    # Languages in one order: the same set gives the same documents and the same units.
    config = CaptionConfig(options.captioner, tuple(sorted(set(options.languages))), options.seed)
    _load(config)
    return manifest_job(NAME, partial(make_captions, config=config), options, repr(astuple(config)))


def make_captions(document: Document, draft: Draft, config: CaptionConfig) -> None:
    """Adds a document for each image and language; frames of videos are passed over.

    An image that cannot be decoded, or that the captioner fails on, is skipped by itself: "unreadable_media" and the
    like, "captioner_failed", "empty_caption". Raises SampleError "no_picture" for a document that has none.
    """
    # Frames of videos are no stills: a caption of one would not be the video's.
    captioner = _load(config)
    elements = parse_prompt(document.text)
    images = [element for element in elements if isinstance(element, ImageElement) and not element.frame]
    if not images:
        raise SampleError("no_picture", "there is no image in it")
    for number, element in enumerate(images):
        # A generator for each image: its prompts do not change when another image fails.
        rng = random.Random(f"{config.seed}/{document.id}/{number}")
        try:
            media = find_media(element.reference, document.media)
            image = decode_image(media)
        except SampleError as error:
            draft.skip(error.cause, str(error))
            continue
        # The image is linked once, and only when a caption was written.
        path = ""
        for language in config.languages:
            prompt = rng.choice(DESCRIBE_IMAGE[language])
            try:
                words = _write_caption(captioner, image, prompt, language, media)
            except SampleError as error:
                draft.skip(error.cause, str(error))
                continue
            path = path or draft.link(media)
            draft.add(turn(image_tag(path) + prompt, words), "caption")


def _write_caption(captioner: Captioner, image: np.ndarray, prompt: str, language: str, media: Media) -> str:
    name = f"{media.name} ({language})"
    # A user's program: what it raises costs this caption, what it answers is checked before it is text to learn.
    try:
        words = captioner.caption(image, prompt, language)
    except Exception as error:  # the user's program may raise anything
        raise SampleError("captioner_failed", f"{name}: {error or type(error).__name__}") from error
    if not isinstance(words, str):
        raise SampleError("captioner_failed", f"{name}: a caption is text, not {type(words).__name__}")
    if not (words := words.strip()):
        raise SampleError("empty_caption", f"{name}: the caption is empty")
    return words


def _load(config: CaptionConfig) -> Captioner:
    return load_hook("--captioner", config.captioner, "caption")


CAPTIONS = SynthesisTask(
    NAME,
    "Captions of images by a program of the user's: a caption document for every image and language.",
    add_arguments,
    make_job,
)
