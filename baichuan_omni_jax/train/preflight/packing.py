"""What preflight assumes that the rows of a step hold, as it has no data: full rows of log-normal documents."""

import math
from dataclasses import dataclass

import numpy as np

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.flops.audio import full_mel_slots
from baichuan_omni_jax.train.input import mel_slot_frames

_BLOCK = 512  # tokens of an attention block where a run chooses them by its documents


@dataclass(frozen=True)
class Packing:
    """Log-normal document lengths (mean and sigma of the logarithm), images of `image_patches` patches each.

    Rows are full: documents one after the other, the last one cut at the row's end; every media budget used up.
    """

    mean: float = 3000.0
    sigma: float = 1.2
    image_patches: int = 1024
    seed: int = 0

    def sentence(self) -> str:
        """Says what is assumed, for people."""
        return (
            f"full rows of log-normal documents (mean {self.mean:g} tokens, sigma {self.sigma:g}), all media budgets "
            f"used, images of {self.image_patches} patches, a text loss on every slot that holds no image or audio"
        )

    def counts(self, run: RunConfig, omni: OmniConfig) -> dict[str, int | float]:
        """Counts what the rows of one step hold, under the names of the task's `batch_counts`."""
        rng, budgets, rows = np.random.default_rng(self.seed), run.data.budgets, run.data.rows
        vision, audio_head, audio_task = "vision" in run.branches, "audio_head" in run.branches, run.task != "omni"
        patches, frames, targets = (
            budgets.patches * vision,
            budgets.audio_frames * audio_head,
            budgets.audio_targets * audio_head,
        )
        # Documents fill rows to the end; media budgets are used up, and their slots carry no text loss.
        lengths = [length for _ in range(rows) for length in self._row(rng, budgets.tokens)]
        media = patches // omni.vision.merged_patches + budgets.audio_frames * (audio_head or audio_task)
        return {
            "tokens": rows * budgets.tokens,
            "causal_pairs": sum(length * (length + 1) // 2 for length in lengths),
            "text_targets": rows * min(max(budgets.tokens - media, 0), budgets.text_targets or budgets.tokens),
            "patches": rows * patches,
            "patch_pairs": rows * self._patch_pairs(patches, run.data.media_shards),
            "audio_frames": rows * frames,
            "audio_targets": rows * targets,
            **(full_mel_slots(run, omni, mel_slot_frames(run, omni)) if audio_task else {}),
        }

    def visited_pairs(self, run: RunConfig) -> int:
        """Counts pairs of tokens in the blocks that the attention kernels visit, masked ones included."""
        compute, rng, total = run.compute, np.random.default_rng(self.seed), 0
        # Without data nobody has chosen blocks: those that a run has by default.
        side = compute.attention_block if isinstance(compute.attention_block, int) else _BLOCK
        block_q, block_kv = compute.attention_q_block or side, compute.attention_kv_block or side
        for _ in range(run.data.rows):
            ends = np.cumsum(self._row(rng, run.data.budgets.tokens))
            queries, keys = (np.arange(0, run.data.budgets.tokens, block) for block in (block_q, block_kv))
            # Blocks of keys that reach into the queries' first document, and do not begin after them.
            first, last = np.searchsorted(ends, queries, "right"), np.searchsorted(ends, keys + block_kv - 1, "right")
            visited = (last >= first[:, None]) & (keys < queries[:, None] + block_q)
            total += int(visited.sum()) * block_q * block_kv
        return total

    def _row(self, rng: np.random.Generator, room: int) -> list[int]:
        """Draws the lengths of the documents of one row of `room` tokens."""
        lengths = []
        # Log-normal with the given mean: the logarithm's mean is lower by half its variance.
        while room:
            drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
            lengths.append(min(max(int(drawn), 1), room))
            room -= lengths[-1]
        return lengths

    def _patch_pairs(self, patches: int, shards: int) -> int:
        """Counts pairs of patches of one image; a media shard ends with a smaller one where a rest is left."""
        # Images lie on one media shard each.
        part = patches // shards
        whole, rest = divmod(part, self.image_patches)
        return shards * (whole * self.image_patches**2 + rest**2)
