"""Mel slots of a row, one for each window of sound: how many frames they have, and what they show of longer windows.

Every step has slots of one size, the smallest of `data.mel_frames` that holds its longest window: all hosts know it
from the index. A window longer than the largest size is cropped to it, at a place that depends on `data.seed` and on
what shares its row: not on workers or hosts, and another one in every epoch. Crops begin at whole code frames:

    size 16, window of 40 mel frames, 8 to a code frame    ->  frames 0-15, 8-23, 16-31 or 24-39
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.media.mel_targets import mel_target


@dataclass(frozen=True)
class MelSlots:
    """The sizes of slots, ascending, in mel frames, and the seed of crops. `per_code` mel frames make a code frame.

    `rate` and `hop` are the mel's, in Hz and samples; `targets` what decoders learn to make of the same sound, by name.
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
        """Frames of a target's slot beside a mel slot of `size`."""
        target = self.targets[name]
        return target.frames(size * self.hop * target.rate // self.rate)

    def make_targets(
        self, waves: Mapping[int, Float32[np.ndarray, "_"]], size: int, skipped: int
    ) -> dict[str, Float32[np.ndarray, "_ mels"]]:
        """Every target of what a slot of `size` shows of a window whose first `skipped` code frames it leaves out.

        Frame i of each begins i hops after what is shown, and is the one that the whole window's mel has there.
        """
        made = {}
        for name, target in self.targets.items():
            start, length = (frames * self.hop * target.rate // self.rate for frames in (skipped * self.per_code, size))
            made[name] = mel_target(waves[target.rate], target, start, length)
        return made

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


def mel_slots(config: DataConfig, audio: AudioConfig, targets: Mapping[str, MelTargetSpec] | None = None) -> MelSlots:
    """The slots of a run. Raises ConfigError for sizes that do not ascend or are longer than a window."""
    sizes, per_code = config.mel_frames or (audio.max_mel_frames,), audio.stride_size * audio.avg_pooler
    if sorted(set(sizes)) != list(sizes) or sizes[0] < per_code or sizes[-1] > audio.max_mel_frames:
        raise ConfigError(
            f"data.mel_frames {sizes} must ascend from at least {per_code} to at most {audio.max_mel_frames}, "
            "the mel frames of a code frame and of a whole window"
        )
    return MelSlots(sizes, per_code, config.seed, audio.sampling_rate, audio.hop_length, targets or {})
