"""From the elements of a document to its token sequence: turns, frames and spans, slots of media, loss weights.

Which elements. A turn begins at `<C_Q>`; what stands before the first one is the system prompt and stays with every
part. Items are what a span counts: each token of text, end of text included, and each medium, a video listed frame by
frame being one.

Which tokens. A layout is made of counts alone, so that measuring and encoding a document share it.

What is learned. First 1 for every target and 0 elsewhere, from the layout (`text_targets`, `audio_targets`), then what
the document counts by `train.document_weighting` and its source's `loss_weight` (`weigh`). Weights are made where a
document is decoded, from that document alone, so they are the same whatever shares its row, step or host. A piece of a
document that was too long is a document of its own. The loss divides by the sum of the weights of the whole step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar, cast

import numpy as np
from jaxtyping import Float32, Int32

from baichuan_omni_jax.config import SpecialTokens
from baichuan_omni_jax.config.loss_shares import POWERS
from data_pipelines.documents.document import Document, EncodedDocument
from data_pipelines.documents.prompts import (
    AudioElement,
    Element,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    parse_prompt,
)
from data_pipelines.tokenizers.tokenizer import TRAINABLE_START, USER

T = TypeVar("T")
Span = tuple[int, int]


def document_elements(document: Document, max_frames: int = 0) -> list[Element]:
    """Reads the elements of the turns and frames that `document` has, its listed videos of at most `max_frames`.

    0 is no limit. Its `span` is cut later, when text is tokens. A document without any `<trainable_start>` is trainable
    as a whole. Raises SampleError "bad_prompt".
    """
    elements = parse_prompt(document.text)
    # Unmarked documents train whole, as released.
    if not is_marked(document):
        learnable = TextElement | AudioElement | TokensElement
        elements = [replace(each, trainable=True) if isinstance(each, learnable) else each for each in elements]
    # A piece has the system prompt and its own turns.
    if document.turns is not None:
        head, turns = cut_turns(elements)
        elements = head + [element for turn in turns[slice(*document.turns)] for element in turn]
    # The stricter of the two limits; 0 is none.
    most = min(document.max_frames or max_frames, max_frames or document.max_frames)
    return thin_frames(elements, most) if most else elements


def is_marked(document: Document) -> bool:
    """Tells whether the document, of which this may be a piece, says what of it is trainable."""
    return TRAINABLE_START in document.text


def cut_turns(elements: list[Element]) -> tuple[list[Element], list[list[Element]]]:
    """Cuts elements into the system prompt and the turns with their media; marks of loss stay with what they mark."""
    parts: list[list[Element]] = [[]]
    for element in elements:
        if not isinstance(element, TextElement) or element.plain:
            parts[-1].append(element)
            continue
        first, *others = element.text.split(USER)
        if first:
            parts[-1].append(replace(element, text=first))
        parts += [[cast(Element, replace(element, text=USER + text))] for text in others]
    return parts[0], parts[1:]


def has_frames(elements: list[Element]) -> bool:
    """Tells whether there are videos, as files or frame by frame."""
    return any(isinstance(each, VideoElement) or _frame_of(each) is not None for each in elements)


def thin_frames(elements: Sequence[T], most: int) -> list[T]:
    """Thins videos that are listed frame by frame to at most `most` frames each; files are thinned as they are read.

    Of n frames the i-th that stays is number int(i * n / most), as in the released processor. A list between the marks
    of a video is one, and so are frames that follow each other outside of them.
    """
    kept: list[T] = []
    for video, run in groupby(elements, key=_frame_of):
        run = list(run)
        if video is not None and len(run) > most:
            run = [run[int(place * len(run) / most)] for place in range(most)]
        kept += run
    return kept


def _frame_of(element: object) -> int | None:
    """Returns the number of the video that a listed frame is of; None for what is no such frame."""
    return element.video if isinstance(element, ImageElement) and element.frame else None


@dataclass(frozen=True)
class Ids:
    """Text as the ids of its tokens: so many items."""

    ids: Sequence[int]
    trainable: bool = False

    def __len__(self) -> int:
        return len(self.ids)


Run = Ids | tuple[Element, ...]  # tokens, or the elements of one medium


def group_media(elements: Sequence[Element | Ids]) -> list[Run]:
    """Groups elements into runs: ids as they are, each medium by itself, neighboring frames of one listed video
    together.
    """
    runs: list[Run] = []
    for element in elements:
        if isinstance(element, Ids):
            runs += [element] if len(element) else []
            continue
        last, video = runs[-1] if runs else (), _frame_of(element)
        if video is not None and last and not isinstance(last, Ids) and _frame_of(last[-1]) == video:
            runs[-1] = (*last, element)
        else:
            runs.append((element,))
    return runs


def cut_span(runs: Sequence[Run], span: Span) -> tuple[list[Element | Ids], Element | Ids | None]:
    """Cuts out a span of items; returns its elements and the one after it (None at the document's end)."""
    found: list[Element | Ids] = []
    for (start, stop), run in place_runs(runs):
        if start >= span[1]:
            return found, run if isinstance(run, Ids) else run[0]
        first, last = max(span[0] - start, 0), min(span[1], stop) - start
        if isinstance(run, Ids):
            found += [Ids(run.ids[first:last], run.trainable)] if first < last else []
            if stop > span[1]:
                return found, Ids(run.ids[last:], run.trainable)
        elif first < last:
            found += run
    return found, None


def place_runs(runs: Sequence[Run]) -> Iterator[tuple[Span, Run]]:
    """Gives the places of each run among the items, and the run."""
    place = 0
    for run in runs:
        size = len(run) if isinstance(run, Ids) else 1
        yield (place, place + size), run
        place += size


@dataclass(frozen=True)
class TextPart:
    """Token ids of a stretch of text."""

    ids: Sequence[int]
    trainable: bool = False


@dataclass(frozen=True)
class VisualPart:
    """One image of `count` visual tokens; `frame` when it belongs to a video."""

    count: int
    frame: bool = False


@dataclass(frozen=True)
class AudioPart:
    """One clip of `count` code frames, heard or spoken."""

    count: int
    spoken: bool = False
    trainable: bool = False


Part = TextPart | VisualPart | AudioPart


@dataclass
class Layout:
    """A document's sequence: its tokens, and what of it is predicted. Slots are in order of appearance."""

    tokens: list[int] = field(default_factory=list)
    predicted: list[bool] = field(default_factory=list)  # token i is a text target of position i - 1
    visual_slots: list[int] = field(default_factory=list)  # of visual tokens
    audio_slots: list[int] = field(default_factory=list)  # of code frames
    # Of each clip that carries loss: slot of its start mark, place of its first frame, number of frames.
    spoken: list[tuple[int, int, int]] = field(default_factory=list)
    # Of a part of a document: the id of the token after the last, and whether it is a target.
    following: tuple[int, bool] = (0, False)

    @property
    def text_targets(self) -> int:
        """Positions with a text target."""
        return sum(self.predicted[1:]) + (self.following[1] and bool(self.tokens))

    @property
    def audio_targets(self) -> int:
        """Frames to predict, the end frame of each clip included."""
        return sum(count + 1 for _, _, count in self.spoken)

    @property
    def has_loss(self) -> bool:
        return self.text_targets > 0 or bool(self.spoken)


def lay_out(parts: Iterable[Part], tokens: SpecialTokens, following: Part | None = None) -> Layout:
    """Lays out the sequence of `parts`, which `following` comes after in the document that they are of.

    Media marks are never predicted, except the `<audiogen_start>` of a clip to be spoken: the text decides to speak.
    Nor are pads and `<audiogen_end>`, which the audio head decides.
    """
    layout = Layout()
    for part in parts:
        if isinstance(part, TextPart):
            layout.tokens += part.ids
            layout.predicted += [part.trainable] * len(part.ids)
        elif isinstance(part, VisualPart):
            pad = tokens.video_place if part.frame else tokens.image_pad
            layout.visual_slots += _add_media(layout, tokens.image_start, pad, tokens.image_end, part.count)
        else:
            # Only speech to be generated is predicted; audio heard is input.
            learned = part.spoken and part.trainable
            if learned:
                layout.spoken.append((len(layout.tokens), len(layout.audio_slots), part.count))
            start, end = tokens.audio_start, tokens.audio_end
            if part.spoken:
                start, end = tokens.audiogen_start, tokens.audiogen_end
            layout.audio_slots += _add_media(layout, start, tokens.audio_pad, end, part.count, start_predicted=learned)
    if following is not None:
        after = lay_out([following], tokens)
        layout.following = (after.tokens[0], after.predicted[0])
    return layout


def _add_media(layout: Layout, start: int, pad: int, end: int, count: int, start_predicted: bool = False) -> range:
    first = len(layout.tokens) + 1
    layout.tokens += [start, *[pad] * count, end]
    layout.predicted += [start_predicted, *[False] * (count + 1)]
    return range(first, first + count)


def text_targets(layout: Layout) -> tuple[Int32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """Returns (targets, weights), shifted: target i is token i + 1 where that token is predicted, else 0 with weight 0.

    Tokens [7, 8, 9] of which 8 and 9 are predicted give targets [8, 9, 0] and weights [1, 1, 0]. Of a part of a
    document the last position has the target that it has in the whole.
    """
    # Shifted once, here: position i predicts token i + 1.
    after, predicted = layout.following
    weights = np.array([*layout.predicted, predicted][1:], np.float32)
    following = np.array([*layout.tokens, after][1:], np.int32)
    return np.where(weights > 0, following, 0).astype(np.int32), weights


def audio_targets(
    layout: Layout, codes: Int32[np.ndarray, "a q"], end_class: int
) -> tuple[Int32[np.ndarray, "c q"], Float32[np.ndarray, "c q"], Int32[np.ndarray, "c"]]:
    """Returns (frames, weights, slots) to be predicted; `codes` are all code frames of the document.

    A clip of frames A B after its start mark at slot 4 (frames at 5 and 6) gives: A at slot 4, B at 5, and the end
    frame (`end_class` at level 0, the only level with weight) at 6.
    """
    levels = codes.shape[1]
    frames = np.zeros((layout.audio_targets, levels), np.int32)
    weights = np.ones((layout.audio_targets, levels), np.float32)
    slots = np.zeros(layout.audio_targets, np.int32)
    place = 0
    for start, first, count in layout.spoken:
        end = place + count
        # The start mark predicts the first frame, each frame the next, the last one the end.
        frames[place:end] = codes[first : first + count]
        # The end frame is a class of level 0 alone, so upper levels have no weight there.
        frames[end, 0] = end_class
        weights[end, 1:] = 0.0
        slots[place : end + 1] = np.arange(start, start + count + 1)
        place = end + 1
    return frames, weights, slots


def weigh(
    document: EncodedDocument, weighting: str, loss_weight: float, untrained_targets: Sequence[int] = ()
) -> EncodedDocument:
    """Gives a document the weights that make it count as `train.document_weighting` and its source say.

    A modality's own count decides: text targets for the text, and for each audio level the frames that have a weight
    there (end frames at the first level alone). 4 text targets weigh 1 each by `token`, 1/2 by `sqrt`, 1/4 by
    `document`, all times `loss_weight`.

    Args:
        document: with weights of 1 and 0.
        weighting: `token`, `sqrt` or `document`.
        loss_weight: the source's own factor.
        untrained_targets: special tokens whose rows of the head do not train: as text targets they weigh nothing and
            are not counted. The train step masks the same ids in batches that come from elsewhere.

    Returns:
        The document with its weights, or itself where nothing changes.
    """
    # Before anything is counted: what does not train must not take a share of what the document counts.
    refused = np.isin(document.text_targets, untrained_targets) & (document.text_weights > 0)
    if refused.any():
        document = replace(document, text_weights=np.where(refused, 0, document.text_weights).astype(np.float32))
    if (power := POWERS[weighting]) == 0 and loss_weight == 1:
        return document
    # Each modality, and each audio level, by its own count.
    scaled = {}
    for name in ("text_weights", "audio_weights"):
        weights = getattr(document, name)
        counts = np.maximum((weights > 0).sum(0), 1)
        scaled[name] = (weights * (loss_weight / counts**power)).astype(np.float32)
    return replace(document, **scaled)
