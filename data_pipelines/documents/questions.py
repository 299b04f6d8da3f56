"""Held-out documents as questions, and with the media of others: what tells whether a model uses what it is shown.

A question. Everything up to a document's first trainable part is the prompt, as training sees it; that part is the
reference, text or speech:

    <C_Q>IMAGE What color is it?<C_A><trainable_start>It is red.<trainable_end>       prompt up to <C_A>, "It is red."

Documents that read text aloud (`SPEECH_TYPES`) are answered in speech, also where it comes in pieces, each behind its
text; of other answers with speech their first text is the reference.

Exchanged media. All that a document shows or plays, but for speech of the assistant, is exchanged with another
document's. Of a document that shows nothing and speaks, the text that it speaks is exchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from jaxtyping import Int32

from data_pipelines.documents.document import SPEECH_TYPES, Document, EncodedDocument
from data_pipelines.documents.media_items import Codes, PrecomputedAudio
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompt_writing import ASR_PROMPT, text_of, write_prompt
from data_pipelines.documents.prompts import AudioElement, Element, ImageElement, TextElement, VideoElement
from data_pipelines.documents.sequence import document_elements
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference, find_media

Shown = ImageElement | VideoElement | AudioElement


@dataclass(frozen=True)
class Question:
    """One document as a question.

    Attributes:
        location: its manifest line or record.
        type: its type.
        asked: the text of the prompt, as a reader would read it.
        prompt: what the model is given; it ends with the mark that begins speech where the answer is speech alone.
        reference: the text that is right; of an answer in speech what it is to say.
        tokens: of the answer's text; 0 where it is speech alone.
        frames: code frames of the recorded answer; 0 where the answer is text.
    """

    location: str
    type: str
    asked: str
    prompt: EncodedDocument
    reference: str
    tokens: int = 0
    frames: int = 0


def read_question(document: Document, processor: Processor, codes: Codes | None) -> Question:
    """Makes a question of a document, of its first answer where it has several.

    Raises SampleError: "no_question" where nothing stands before the first trainable part, or the document is a piece
    of one that was too long; otherwise as `Processor.encode`.
    """
    if document.span is not None or document.turns is not None:
        raise SampleError("no_question", "the document is too long for a row, so that only pieces of it are there")
    elements = document_elements(document, processor.config.vision.max_frames)
    learned = next((n for n, each in enumerate(elements) if getattr(each, "trainable", False)), len(elements))
    if not 0 < learned < len(elements):
        raise SampleError("no_question", "nothing stands before the document's first trainable part")
    # The prompt ends where the first target is: training and asking cut at the same token.
    encoded, special = processor.encode(document, codes), processor.config.tokens
    first = int(np.flatnonzero(encoded.text_weights)[0])
    asked = text_of(cast(list[Element], elements[:learned]))
    if encoded.text_targets[first] == special.audiogen_start:
        # The mark itself belongs to the prompt: that there is to be speech is no part of the question.
        slots = encoded.audio_target_slots
        frames = int((slots - slots[0] == np.arange(len(slots))).sum()) - 1
        prompt = cut_prompt(encoded, first + 2, processor)
        return Question(document.location, document.type, asked, prompt, asked, frames=frames)
    prompt = cut_prompt(encoded, first + 1, processor)
    if document.type in SPEECH_TYPES and len(encoded.audio_target_slots):
        # In pieces: what is to be heard are their texts, which the model writes as it speaks.
        spoken = [each for each in elements[learned:] if isinstance(each, TextElement)]
        frames = len(encoded.audio_codes) - len(prompt.audio_codes)
        tokens = int(np.count_nonzero(encoded.text_weights))
        return Question(document.location, document.type, asked, prompt, text_of(spoken), tokens, frames)
    ids = _leading_targets(encoded, first, (special.audiogen_start, special.end_of_text))
    reference = processor.tokenizer.decode(ids).strip()
    if not reference:
        raise SampleError("no_question", "the document's first trainable part has no text")
    return Question(document.location, document.type, asked, prompt, reference, tokens=len(ids))


def _leading_targets(encoded: EncodedDocument, first: int, ends: Sequence[int]) -> list[int]:
    """Returns the text targets from position `first` on, up to one of `ends` or what is no target."""
    ids = []
    for target, weight in zip(encoded.text_targets[first:].tolist(), encoded.text_weights[first:], strict=True):
        if not weight or target in ends:
            break
        ids.append(target)
    return ids


def cut_prompt(encoded: EncodedDocument, tokens: int, processor: Processor) -> EncodedDocument:
    """Returns the first `tokens` tokens of a document, with their media; it has nothing to predict."""
    audio = encoded.audio_slots < tokens
    visual = encoded.visual_slots < tokens
    patches = int(visual.sum()) * processor.config.vision.merged_patches
    levels = encoded.audio_codes.shape[1]
    return replace(
        encoded,
        tokens=encoded.tokens[:tokens],
        text_targets=np.zeros(tokens, np.int32),
        text_weights=np.zeros(tokens, np.float32),
        audio_codes=encoded.audio_codes[audio],
        audio_slots=encoded.audio_slots[audio],
        audio_targets=np.zeros((0, levels), np.int32),
        audio_weights=np.zeros((0, levels), np.float32),
        audio_target_slots=np.zeros(0, np.int32),
        patches=encoded.patches[:patches],
        patch_grid=encoded.patch_grid[:patches],
        patch_frames=encoded.patch_frames[:patches],
        visual_slots=encoded.visual_slots[visual],
    )


def recognition_prompt(codes: Int32[np.ndarray, "n q"], processor: Processor) -> EncodedDocument:
    """Encodes the request to transcribe what these code frames say."""
    return processor.encode_prompt([TextElement(ASR_PROMPT), PrecomputedAudio(codes, False)], {})


@dataclass(frozen=True)
class Exchangeable:
    """What of a document can be exchanged: its places among the elements, what kind each is, and its content."""

    elements: tuple[Element, ...]
    places: tuple[int, ...]
    kinds: tuple[str, ...]
    contents: tuple[str, ...]

    @property
    def of_text(self) -> bool:
        """Whether it is text, of a document that shows and plays nothing."""
        return self.kinds[0] == "text"


def find_exchangeable(document: Document, processor: Processor) -> Exchangeable | None:
    """Finds what of a document can be exchanged; None where there is nothing.

    Raises SampleError for media that cannot be read.
    """
    if document.span is not None or document.turns is not None:
        return None
    elements = tuple(document_elements(document, processor.config.vision.max_frames))
    spoken = [isinstance(each, AudioElement) and each.spoken for each in elements]
    if places := [n for n, each in enumerate(elements) if isinstance(each, Shown) and not spoken[n]]:
        shown = [cast(Shown, elements[place]) for place in places]
        kinds = tuple(type(each).__name__ for each in shown)
        # Two files of one content are one medium, whatever they are called.
        contents = tuple(find_media(each.reference, document.media).content_hash() for each in shown)
        return Exchangeable(elements, tuple(places), kinds, contents)
    # Text that is spoken: what stands before speech is all that the speech depends on, unless the answer has text too.
    if not any(spoken) or any(isinstance(each, TextElement) and each.trainable for each in elements):
        return None
    texts = [n for n, each in enumerate(elements) if isinstance(each, TextElement) and not each.trainable]
    contents = tuple(cast(TextElement, elements[place]).text for place in texts)
    return Exchangeable(elements, tuple(texts), ("text",) * len(texts), contents) if texts else None


def pair_up(contents: Sequence[Sequence[str]]) -> list[int | None]:
    """Chooses for each of n documents another one: the one that stands so many places further, round the end.

    The step is the smallest by which no document meets its own content; where there is none, each takes the first
    further one whose content differs, or None.

    >>> pair_up(["a", "a", "b", "c"]), pair_up(["a", "a"])
    ([2, 3, 0, 1], [None, None])
    """
    n = len(contents)
    meets = lambda one, step: contents[one] == contents[(one + step) % n]  # noqa: E731
    for step in range(1, n):
        if not any(meets(one, step) for one in range(n)):
            return [(one + step) % n for one in range(n)]
    return [next(((one + step) % n for step in range(1, n) if not meets(one, step)), None) for one in range(n)]


def exchange(document: Document, own: Exchangeable, other: Exchangeable, source: Document) -> Document:
    """Returns a document with what can be exchanged of it taken from another one.

    Args:
        document: the one to change.
        own: what of it can be exchanged.
        other: the same of `source`; its kinds are those of `own`.
        source: the other document, of the same source of documents.
    """
    elements, media = list(own.elements), document.media
    for place, taken in zip(own.places, other.places, strict=True):
        element = other.elements[taken]
        # A record of a built data set brings its media under names of its own.
        if isinstance(media, Mapping) and isinstance(element, Shown) and not element.reference.base64:
            name = f"exchanged {place}"
            media = {**media, name: find_media(element.reference, source.media)}
            element = replace(element, reference=MediaReference(path=name))
        elements[place] = element
    return replace(document, text=str(write_prompt(elements)), media=media)
