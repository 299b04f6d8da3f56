"""Mel slots of a row, one for each window of sound: how many frames they have, and what they show of longer windows.

Every step has slots of one size, the smallest of `data.mel_frames` that holds its longest window: all hosts know it
from the index. A window longer than the largest size is cropped to it, at a place that depends on `data.seed` and on
what shares its row: not on workers or hosts, and another one in every epoch. Crops begin at whole code frames:

    size 16, window of 40 mel frames, 8 to a code frame    ->  frames 0-15, 8-23, 16-31 or 24-39
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.config import ConfigError, DataConfig


@dataclass(frozen=True)
class MelSlots:
    """The sizes of slots, ascending, in mel frames, and the seed of crops. `per_code` mel frames make a code frame."""

    sizes: tuple[int, ...]
    per_code: int
    seed: int

    def size(self, code_frames: int) -> int:
        """Mel frames of the slots of a step whose longest window, or clip, has so many code frames."""
        longest = self.per_code * (code_frames + 1)  # the last, partial group gives no code
        return next((size for size in self.sizes if size >= longest), self.sizes[-1])

    def show(
        self, mel: Float32[np.ndarray, "f mels"], size: int, key: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "g mels"], int]:
        """What a slot of `size` shows of a window, and how many code frames lie before that. `key` draws the place."""
        steps = max(0, len(mel) - size) // self.per_code
        skipped = int(np.random.default_rng([self.seed, *key]).integers(steps + 1)) if steps else 0
        return mel[skipped * self.per_code :][:size], skipped


def row_key(row: Sequence[tuple[int, int]]) -> int:
    """A number that stands for the documents of a row."""
    return zlib.crc32(np.asarray(row, np.int64).tobytes())


def mel_slots(config: DataConfig, audio: AudioConfig) -> MelSlots:
    """The slots of a run. Raises ConfigError for sizes that do not ascend or are longer than a window."""
    sizes, per_code = config.mel_frames or (audio.max_mel_frames,), audio.stride_size * audio.avg_pooler
    if sorted(set(sizes)) != list(sizes) or sizes[0] < per_code or sizes[-1] > audio.max_mel_frames:
        raise ConfigError(
            f"data.mel_frames {sizes} must ascend from at least {per_code} to at most {audio.max_mel_frames}, "
            "the mel frames of a code frame and of a whole window"
        )
    return MelSlots(sizes, per_code, config.seed)
