"""The rows for which model FLOPs are stated: what a full global batch holds under plain assumptions."""

import math
from dataclasses import dataclass

import numpy as np

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.flops.audio import full_slots
from baichuan_omni_jax.train.tasks.audio import slot_frames


@dataclass(frozen=True)
class Packing:
    """Log-normal document lengths (mean and sigma of the logarithm), pictures of `picture` patches each.

    Rows are full: documents one after the other, the last one cut at the row's end; every media budget used up.
    """

    mean: float = 3000.0
    sigma: float = 1.2
    picture: int = 1024
    seed: int = 0

    def sentence(self) -> str:
        """What is assumed, for people."""
        return (
            f"full rows of log-normal documents (mean {self.mean:g} tokens, sigma {self.sigma:g}), all media budgets "
            f"used, pictures of {self.picture} patches, a text loss on every slot that holds no picture or sound"
        )

    def counts(self, run: RunConfig, omni: OmniConfig) -> dict[str, int]:
        """What the rows of one step hold, under the names of the task's `counts`."""
        rng, budgets, rows = np.random.default_rng(self.seed), run.data.budgets, run.data.rows
        vision, sound, hears = "vision" in run.branches, "audio_head" in run.branches, run.task != "omni"
        patches, frames, targets = (
            budgets.patches * vision,
            budgets.audio_frames * sound,
            budgets.audio_targets * sound,
        )
        lengths = [length for _ in range(rows) for length in self._row(rng, budgets.tokens)]
        media = patches // omni.vision.merged_patches + budgets.audio_frames * (sound or hears)
        return {
            "tokens": rows * budgets.tokens,
            "causal_pairs": sum(length * (length + 1) // 2 for length in lengths),
            "text_targets": rows * max(budgets.tokens - media, 0),
            "patches": rows * patches,
            "patch_pairs": rows * self._patch_pairs(patches, run.data.media_shards),
            "audio_frames": rows * frames,
            "audio_targets": rows * targets,
            **(full_slots(run, omni, slot_frames(run, omni)) if hears else {}),
        }

    def _row(self, rng: np.random.Generator, room: int) -> list[int]:
        """Lengths of the documents of one row of `room` tokens."""
        lengths = []
        while room:
            drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
            lengths.append(min(max(int(drawn), 1), room))
            room -= lengths[-1]
        return lengths

    def _patch_pairs(self, patches: int, shards: int) -> int:
        """Pairs of patches of one picture; each media shard ends with a smaller one where `picture` leaves a rest."""
        part = patches // shards
        whole, rest = divmod(part, self.picture)
        return shards * (whole * self.picture**2 + rest**2)
