"""Where a row's pictures lie in its patch array: in equal parts, no picture or video frame in two of them.

The vision tower splits patches over the mesh and attends within a picture only, so it needs no communication when
each device holds whole pictures. A row of 16 patches in 2 parts, pictures of 3, 6, 5 (largest first, each into the
fullest part that has room):

    patch       0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
    picture     2 2 2 2 2 2 . . | 1 1 1  3  3  3  3  3        within a part, in the order of the row
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from baichuan_omni_jax.config import DataConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError


@dataclass(frozen=True)
class PatchLayout:
    """The `patches` places of a row in `parts` equal parts. One part: pictures lie one after the other."""

    patches: int
    parts: int = 1

    @property
    def room(self) -> int:
        """Patches of a part."""
        return self.patches // self.parts

    def fits(self, pictures: Sequence[int]) -> bool:
        """Whether pictures of these sizes can be placed in one row."""
        largest, total = max(pictures, default=0), sum(pictures)
        if largest > self.room or total > self.parts * self.room:
            return False
        # A picture finds every part too full only when each holds more than `room - largest`.
        if len(pictures) <= self.parts or total <= self.parts * (self.room - largest):
            return True
        return self._parts_of(pictures) is not None

    def starts(self, pictures: Sequence[int]) -> Int32[np.ndarray, "n"]:
        """First place of each of a row's n pictures, given their sizes in row order. Raises ValueError: no room."""
        parts = self._parts_of(pictures)
        if parts is None:
            raise ValueError(f"{len(pictures)} pictures do not fit {self.parts} parts of {self.room} patches")
        free = [part * self.room for part in range(self.parts)]
        starts = np.zeros(len(pictures), np.int32)
        for picture, (size, part) in enumerate(zip(pictures, parts, strict=True)):
            starts[picture] = free[part]
            free[part] += size
        return starts

    def _parts_of(self, pictures: Sequence[int]) -> list[int] | None:
        """Best fit, largest first: of what was tried it fills parts best. Equal sizes keep their order."""
        parts = [0] * len(pictures)
        left = [(self.room, part) for part in range(self.parts)]  # ascending: the fullest part first
        for picture in sorted(range(len(pictures)), key=lambda picture: -pictures[picture]):
            size = pictures[picture]
            fullest = bisect_left(left, (size, 0))
            if fullest == len(left):
                return None
            room, part = left.pop(fullest)
            insort(left, (room - size, part))
            parts[picture] = part
        return parts


def patch_layout(config: DataConfig) -> PatchLayout:
    """The layout of a run's rows."""
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
