"""The token sequence of one document: slots of its media, and which of its tokens are predicted.

A layout is made of counts alone, so that measuring and encoding a document share it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from baichuan_omni_jax.config import SpecialTokens


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
            _add_sound(layout, part, tokens)
    if following is not None:
        after = lay_out([following], tokens)
        layout.following = (after.tokens[0], after.predicted[0])
    return layout


def _add_sound(layout: Layout, part: AudioPart, tokens: SpecialTokens) -> None:
    # Only speech to be generated is predicted; audio heard is input.
    learned = part.spoken and part.trainable
    if learned:
        layout.spoken.append((len(layout.tokens), len(layout.audio_slots), part.count))
    start, end = (tokens.audiogen_start, tokens.audiogen_end) if part.spoken else (tokens.audio_start, tokens.audio_end)
    slots = _add_media(layout, start, tokens.audio_pad, end, part.count, start_predicted=learned)
    layout.audio_slots += slots


def _add_media(layout: Layout, start: int, pad: int, end: int, count: int, start_predicted: bool = False) -> range:
    first = len(layout.tokens) + 1
    layout.tokens += [start, *[pad] * count, end]
    layout.predicted += [start_predicted, *[False] * (count + 1)]
    return range(first, first + count)
