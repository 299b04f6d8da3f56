"""What a row holds: budgets and what documents take of them, images in patch places, windows of audio in mel slots.

Patches lie in equal parts, no image or video frame in two of them. The vision tower splits patches over the mesh and
attends within an image only, so it needs no communication when each device holds whole images. A row of 16 patches in 2
parts, images of 3, 6, 5 (largest first, each into the fullest part that has room):

    patch       0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
    image       2 2 2 2 2 2 . . | 1 1 1  3  3  3  3  3        within a part, in the order of the row

Mel slots, one for each window of audio, have one size in a step: the smallest of `data.mel_frames` that holds its
longest window, which all hosts know from the index. A window longer than the largest size is cropped to it, at a place
that depends on `data.seed` and on what shares its row: not on workers or hosts, and another one in every epoch. Crops
begin at whole code frames:

    size 16, window of 40 mel frames, 8 to a code frame    ->  frames 0-15, 8-23, 16-31 or 24-39
"""

import zlib
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from baichuan_omni_jax.config import Budgets, DataConfig, OmniConfig
from baichuan_omni_jax.config.architecture import AudioConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Lengths
from data_pipelines.media.features import mel_target


@dataclass(frozen=True)
class PatchLayout:
    """The `patches` places of a row in `parts` equal parts. One part: images lie one after the other."""

    patches: int
    parts: int = 1

    @property
    def room(self) -> int:
        """Patches of a part."""
        return self.patches // self.parts

    def fits(self, images: Sequence[int]) -> bool:
        """Tells whether images of these sizes can be placed in one row."""
        largest, total = max(images, default=0), sum(images)
        if largest > self.room or total > self.parts * self.room:
            return False
        # An image finds every part too full only when each holds more than `room - largest`.
        if len(images) <= self.parts or total <= self.parts * (self.room - largest):
            return True
        return self._parts_of(images) is not None

    def starts(self, images: Sequence[int]) -> Int32[np.ndarray, "n"]:
        """Places a row's n images, given their sizes in row order: the first place of each. Raises
        ValueError: no room.
        """
        parts = self._parts_of(images)
        if parts is None:
            raise ValueError(f"{len(images)} images do not fit {self.parts} parts of {self.room} patches")
        # Images of a part follow each other from its start, in row order.
        free = [part * self.room for part in range(self.parts)]
        starts = np.zeros(len(images), np.int32)
        for image, (size, part) in enumerate(zip(images, parts, strict=True)):
            starts[image] = free[part]
            free[part] += size
        return starts

    def _parts_of(self, images: Sequence[int]) -> list[int] | None:
        """Fits the largest first, each where it fits best: of what was tried it fills parts best. Equal sizes keep
        their order.
        """
        parts = [0] * len(images)
        left = [(self.room, part) for part in range(self.parts)]  # ascending: the fullest part first
        # Largest first: small images fill what is left.
        for image in sorted(range(len(images)), key=lambda image: -images[image]):
            size = images[image]
            fullest = bisect_left(left, (size, 0))
            if fullest == len(left):
                return None
            room, part = left.pop(fullest)
            insort(left, (room - size, part))
            parts[image] = part
        return parts


def patch_layout(config: DataConfig) -> PatchLayout:
    """Returns the layout of a run's rows."""
    return PatchLayout(config.budgets.patches, config.media_shards)


def check_media_shards(config: DataConfig, omni: OmniConfig) -> None:
    """Raises ConfigError when a row's patches cannot be cut into `media_shards` parts of whole visual tokens."""
    merged, patches = omni.vision.merged_patches, config.budgets.patches
    if config.media_shards < 1:
        raise ConfigError(f"data.media_shards {config.media_shards} must be at least 1")
    if patches % (config.media_shards * merged):
        raise ConfigError(
            f"data.budgets.patches {patches} is not divisible by data.media_shards {config.media_shards} parts "
            f"of whole visual tokens ({merged} patches each)"
        )


@dataclass(frozen=True)
class MelSlots:
    """The sizes of slots, ascending, in mel frames, and the seed of crops. `per_code` mel frames make a code frame.

    `rate` and `hop` are the mel's, in Hz and samples; `targets` what decoders learn to make of the same audio, by name.
    """

    sizes: tuple[int, ...]
    per_code: int
    seed: int
    rate: int = 16000
    hop: int = 160
    targets: Mapping[str, MelTargetSpec] = field(default_factory=dict)

    @property
    def rates(self) -> tuple[int, ...]:
        """At which the targets need samples."""
        return tuple(sorted({target.rate for target in self.targets.values()}))

    def target_frames(self, name: str, size: int) -> int:
        """Returns the frames of a target's slot beside a mel slot of `size`."""
        target = self.targets[name]
        return target.frames(size * self.hop * target.rate // self.rate)

    def make_targets(
        self, waves: Mapping[int, Float32[np.ndarray, "_"]], size: int, skipped: int
    ) -> dict[str, Float32[np.ndarray, "_ mels"]]:
        """Makes every target of what a slot of `size` shows of a window whose first `skipped` code frames it leaves
        out.

        Frame i of each begins i hops after what is shown, and is the one that the whole window's mel has there.
        """
        made = {}
        for name, target in self.targets.items():
            # Counted in samples of the target's own rate, so that both mels show the same stretch of audio.
            start, length = (frames * self.hop * target.rate // self.rate for frames in (skipped * self.per_code, size))
            made[name] = mel_target(waves[target.rate], target, start, length)
        return made

    def size(self, code_frames: int) -> int:
        """Returns the mel frames of the slots of a step whose longest window, or clip, has so many code frames."""
        # One size a step, the smallest that shows all: each size is a program of its own.
        longest = self.per_code * (code_frames + 1)  # the last, partial group gives no code
        return next((size for size in self.sizes if size >= longest), self.sizes[-1])

    def show(
        self, mel: Float32[np.ndarray, "f mels"], size: int, key: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "g mels"], int]:
        """Crops a window to what a slot of `size` shows; returns it and how many code frames lie before. `key` draws
        the place.
        """
        # Crops begin at whole code frames: codes and mel of a slot stay aligned.
        steps = max(0, len(mel) - size) // self.per_code
        skipped = int(np.random.default_rng([self.seed, *key]).integers(steps + 1)) if steps else 0
        return mel[skipped * self.per_code :][:size], skipped


def row_key(row: Sequence[tuple[int, int]]) -> int:
    """Returns a number that stands for the documents of a row."""
    return zlib.crc32(np.asarray(row, np.int64).tobytes())


def mel_slots(config: DataConfig, audio: AudioConfig, targets: Mapping[str, MelTargetSpec] | None = None) -> MelSlots:
    """Returns the slots of a run. Raises ConfigError for sizes that do not ascend or are longer than a window."""
    sizes, per_code = config.mel_frames or (audio.max_mel_frames,), audio.stride_size * audio.avg_pooler
    # The last slot may be shorter than a window: it is cropped. A slot shorter than a code frame shows nothing.
    if sorted(set(sizes)) != list(sizes) or sizes[0] < per_code or sizes[-1] > audio.max_mel_frames:
        raise ConfigError(
            f"data.mel_frames {sizes} must ascend from at least {per_code} to at most {audio.max_mel_frames}, "
            "the mel frames of a code frame and of a whole window"
        )
    return MelSlots(sizes, per_code, config.seed, audio.sampling_rate, audio.hop_length, targets or {})


DocumentKey = tuple[int, int]

BUDGETED = tuple(f.name for f in fields(Budgets))
_PATCHES, AUDIO_TARGETS, TEXT_TARGETS = map(BUDGETED.index, ("patches", "audio_targets", "text_targets"))


class DocumentLengths(NamedTuple):
    """Holds what rows are planned from: the number of a document in its source, what it takes of each budget (tokens
    first), the patches of each of its images, and its source.
    """

    number: int
    lengths: tuple[int, ...]
    image_patches: list[int]
    source: int = 0

    @property
    def trainable(self) -> int:
        """How many text targets and audio frames to predict it has."""
        return self.lengths[TEXT_TARGETS] + self.lengths[AUDIO_TARGETS]

    @property
    def key(self) -> DocumentKey:
        """Names the document in the whole mixture: (source, number)."""
        return self.source, self.number


def budget_vector(budgets: Budgets) -> Int64[np.ndarray, "budgets"]:
    """Returns the budgets in the order of their fields; one that is left out is more than anything needs."""
    limits = budgets.limits()
    return np.array([limits.get(name, np.iinfo(np.int32).max) for name in BUDGETED], np.int64)


def budget_lengths(lengths: Lengths) -> list[int]:
    """Returns what a document takes of each budget, in the order of the budgets' fields."""
    return [getattr(lengths, name) for name in BUDGETED]


@dataclass(frozen=True)
class RowLimits:
    """The budgets of a row, its patches in `media_shards` equal parts of which each holds whole images."""

    budgets: Budgets
    media_shards: int = 1

    @property
    def layout(self) -> PatchLayout:
        return PatchLayout(self.budgets.patches, self.media_shards)

    def exceeds(
        self,
        lengths: Integer[np.ndarray, "n budgets"],
        images: Integer[np.ndarray, "m"],
        counts: Int64[np.ndarray, "n"],
    ) -> Bool[np.ndarray, "n"]:
        """Tells which of n documents an empty row cannot hold; `counts` of the m images are each document's,
        in order.
        """
        # Budgets first, for all documents at once; images are looked at one by one only where they may not fit.
        over = np.any(lengths > budget_vector(self.budgets), axis=1)
        layout, ends = self.layout, np.cumsum(counts)
        some = np.flatnonzero((counts > 0) & ~over)
        if not len(some) or layout.parts == 1:
            return over
        starts = ends - counts
        largest = np.zeros(len(lengths), np.int64)
        holding = np.flatnonzero(counts)
        # The largest image of each document that has any.
        largest[holding] = np.maximum.reduceat(images, starts[holding])
        over |= largest > layout.room
        # An image finds every part too full only when each holds more than `room - largest`.
        safe = (counts <= layout.parts) | (lengths[:, _PATCHES] <= layout.parts * (layout.room - largest))
        for document in np.flatnonzero(~over & ~safe).tolist():
            over[document] = not layout.fits(images[starts[document] : ends[document]].tolist())
        return over

    def why_exceeds(self, lengths: Sequence[int] | Int32[np.ndarray, "budgets"], images: Sequence[int]) -> str:
        """Says why an empty row cannot hold a document; "" when it can."""
        for name, size, limit in zip(BUDGETED, lengths, budget_vector(self.budgets), strict=True):
            if size > limit:
                return f"{size} {name} exceed the row's {limit}"
        layout = self.layout
        if layout.fits(images):
            return ""
        # The budgets hold it: then it is the images, which find no part.
        largest = int(np.argmax(images))
        parts = f"the row's {layout.parts} parts (data.media_shards) of {layout.room} patches"
        if images[largest] > layout.room:
            size = images[largest]
            return f"image {largest + 1} of the document has {size} patches, too many for one of {parts}"
        return f"the document's {len(images)} images of up to {images[largest]} patches do not all fit {parts}"
