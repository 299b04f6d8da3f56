"""Cross-modal documents: sentences about images become speech; a video's audio track stands beside the video.

Of a document with images a share of the sentences is heard instead of written; a task prompt comes first, and loss
stays on what is still written. In a document with videos each is followed by its own track as audio.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import choose_prompt, write_prompt
from data_pipelines.documents.prompts import SPECIAL, AudioElement, Element, ImageElement, TextElement, VideoElement
from data_pipelines.documents.sequence import document_elements
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import probe_audio
from data_pipelines.media.containers import opened
from data_pipelines.media.location import MediaReference, find_media
from data_pipelines.synthesis.speech.speaking import (
    DocumentSpeaker,
    SpeechConfig,
    add_speech_arguments,
    sentences_of,
    speech_config,
)
from data_pipelines.synthesis.units import Draft, SynthesisTask, manifest_job
from data_pipelines.text.spoken_text import spoken_seconds
from data_pipelines.tokenizers.tokenizer import SYSTEM, USER

NAME = "crossmodal"
TYPE = "cross_modal"  # of the new documents
SentenceOrder = Literal["random", "first"]

_RATE = 16000  # Hz, at which tracks are measured

CONTINUE_IMAGES = {
    "zh": (
        "文中有些句子是语音。请看图、听语音，把文字补充完整。",
        "请结合图片和听到的内容，写出其余的文字。",
        "请听其中的语音，再结合图片补充其他信息。",
    ),
    "en": (
        "Some of the sentences are spoken. Look at the pictures, listen, and complete the text.",
        "Write the rest of the text from the pictures and from what you hear.",
        "Listen to the spoken sentences, and add what else the pictures show.",
    ),
}
"""Sentences about pictures are heard; the others are to be written."""
ANSWER_IMAGES = {
    "zh": ("对话中有些话是语音。请看图、听语音，然后回答。", "请结合图片和听到的内容回答。", "请先听，再看图回答。"),
    "en": (
        "Some of this conversation is spoken. Look at the pictures, listen, and answer.",
        "Answer from the pictures and from what you hear.",
        "Listen first, then look and answer.",
    ),
}
"""The same for a conversation."""


@dataclass(frozen=True)
class CrossmodalConfig:
    """Which of the sentences are spoken, and by whom."""

    speech: SpeechConfig
    share: float = 0.25
    """Of the sentences, at least one; the last that carries loss is never spoken."""
    order: SentenceOrder = "random"
    """Any of them, or the first ones."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the task's own options."""
    add_speech_arguments(parser)
    parser.add_argument("--share", type=float, default=0.25, help="of the sentences that are spoken (default 0.25)")
    parser.add_argument(
        "--order", choices=get_args(SentenceOrder), default="random", help="which sentences (default random)"
    )


def make_job(options: Namespace) -> Job:
    """Makes the job of `options`. Raises ConfigError."""
    if not 0 < options.share < 1:
        raise ConfigError(f"--share {options.share} must lie between 0 and 1")
    config = CrossmodalConfig(speech_config(options), options.share, options.order)
    return manifest_job(NAME, partial(cross_modalities, config=config), options, str(config))


def cross_modalities(document: Document, draft: Draft, config: CrossmodalConfig) -> None:
    """Adds the cross-modal form of a document.

    Raises SampleError: "has_sound"; "no_picture" for a document without images and videos; "no_track" for a video
    without audio; "too_short" when nothing would be left to write; as `DocumentSpeaker` and `find_media`; "bad_prompt".
    """
    elements = document_elements(document)
    if any(isinstance(element, AudioElement) for element in elements):
        raise SampleError("has_sound", "there is audio in it already")
    # A video speaks by its own track; sentences about images need a voice.
    kinds = {type(element) for element in elements}
    if VideoElement in kinds:
        new = add_tracks(elements, document)
    elif ImageElement in kinds:
        new = speak_sentences(elements, document, draft, config)
    else:
        raise SampleError("no_picture", "there is neither an image nor a video in it")
    draft.add(write_prompt(_link_media(new, document, draft)), TYPE)


def add_tracks(elements: Sequence[Element], document: Document) -> list[Element]:
    """Returns each video followed by its own track as heard audio, of the same file. Raises SampleError "no_track"."""
    new: list[Element] = []
    for element in elements:
        new.append(element)
        if isinstance(element, VideoElement):
            media = find_media(element.reference, document.media)
            with opened(media, "video") as container:
                if not container.streams.audio:
                    raise SampleError("no_track", f"{media.name} has no audio")
            # Read as audio will be: a track that cannot be is refused here, not where it trains.
            probe_audio(media, _RATE)
            new.append(AudioElement(element.reference))
    return new


def speak_sentences(
    elements: Sequence[Element], document: Document, draft: Draft, config: CrossmodalConfig
) -> list[Element]:
    """Replaces a share of the sentences by their speech, at least one; the last one that carries loss stays written.

    Args:
        elements: of the document.
        document: whose id, with the seed, decides which sentences are spoken.
        draft: where the speech goes.
        config: which share, in which order, by whom.

    Returns:
        The new elements: a task prompt, and speech where sentences were. The system prompt is never spoken.

    Raises:
        SampleError: as `cross_modalities`.
    """
    # What may be spoken: sentences outside the system prompt, less the last one that carries loss.
    parts, sentences = _sentences(elements, config.speech)
    learned = [place for place, sentence in sentences.items() if sentence.trainable]
    if not learned or len(sentences) < 2:
        raise SampleError("too_short", "nothing would be left to write when a sentence is spoken")
    text = "".join(sentence.text for sentence in sentences.values())
    speaker = DocumentSpeaker.for_document(config.speech, document, draft, text)
    candidates = [place for place in sentences if place != learned[-1]]
    # At least one, or nothing would cross; the last learned one stays, or there would be no loss.
    count = min(max(1, round(config.share * len(sentences))), len(candidates))
    chosen = candidates[:count] if config.order == "first" else sorted(speaker.rng.sample(candidates, count))
    for place in chosen:
        parts[place] = AudioElement(MediaReference(path=speaker.say(sentences[place].text)))
    # In a conversation the task prompt opens the first turn of the user, elsewhere the document.
    users = (TextElement(USER), TextElement(USER, trainable=True))
    opening = next((place + 1 for place, part in enumerate(parts) if part in users), 0)
    prompt = choose_prompt(ANSWER_IMAGES if opening else CONTINUE_IMAGES, speaker.language, speaker.rng)
    return [*parts[:opening], TextElement(prompt + "\n"), *parts[opening:]]


def _sentences(elements: Sequence[Element], config: SpeechConfig) -> tuple[list[Element], dict[int, TextElement]]:
    """Cuts the texts among the elements into sentences and special tokens; returns what may be spoken by its place."""
    parts: list[Element] = []
    sentences: dict[int, TextElement] = {}
    system = False
    for element in elements:
        if not isinstance(element, TextElement):
            parts.append(element)
            continue
        for run in filter(None, [element.text] if element.plain else SPECIAL.split(element.text)):
            special = not element.plain and bool(SPECIAL.fullmatch(run))
            # Every special token ends the system prompt but its own mark.
            system = run == SYSTEM if special else system
            for text in [run] if special else sentences_of(run, config):
                sentence = replace(element, text=text)
                if not special and not system and spoken_seconds(text):
                    sentences[len(parts)] = sentence
                parts.append(sentence)
    return parts, sentences


def _link_media(elements: Sequence[Element], document: Document, draft: Draft) -> list[Element]:
    """Keeps media of the source beside the new documents, each file once. Speech is there already."""
    kept: dict[MediaReference, MediaReference] = {}
    videos = {element.reference for element in elements if isinstance(element, VideoElement)}
    new: list[Element] = []
    for element in elements:
        # Speech was saved by the draft; a track is the file of its video.
        if isinstance(element, ImageElement | VideoElement) or (
            isinstance(element, AudioElement) and element.reference in videos
        ):
            if element.reference not in kept:
                kept[element.reference] = MediaReference(path=draft.link(find_media(element.reference, document.media)))
            element = replace(element, reference=kept[element.reference])
        new.append(element)
    return new


CROSSMODAL = SynthesisTask(
    NAME,
    "Cross-modal documents: sentences about images become speech; a video's audio track stands beside the video.",
    add_arguments,
    make_job,
)
