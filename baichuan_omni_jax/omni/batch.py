"""The fields of a packed batch in one list: name, dtype, logical axes, shape, padding (docs/reference/batch.md).

Whoever lays out, compiles for or shards a batch loops over `FIELDS`: the packing of training rows
(`data_pipelines.packing.batch`), the prompts of generation, `abstract_batch`. Which branch reads a field stands in
`branches.py`. A new field begins with a line here and its name there.

The list imports no jax, so data workers read it too; `abstract_batch` alone imports it, when it is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Shaped

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, OmniConfig
from baichuan_omni_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from baichuan_omni_jax.sharding import ShardingRules

Batch = dict[str, Shaped[Any, "b ..."]]
"""Field name -> array of numpy (on the host) or jax, rows first."""


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sizes of one row that shapes of fields refer to by name; 0 where a batch has none of it.

    `tokens` to `mel_windows` are budgets. `visual_tokens` are merged patches, `patch_values` the bytes of a patch,
    `levels` those of the audio codes, `mel_frames` and `mel_bins` the sides of a mel slot.
    """

    tokens: int
    patches: int = 0
    audio_frames: int = 0
    audio_targets: int = 0
    text_targets: int = 0
    mel_windows: int = 0
    visual_tokens: int = 0
    patch_values: int = 0
    levels: int = 0
    mel_frames: int = 0
    mel_bins: int = 0

    @classmethod
    def from_config(cls, budgets: Budgets, omni: OmniConfig, mel_frames: int) -> BatchSizes:
        """Takes the sizes of rows of these budgets for this model, their mel slots of `mel_frames` frames."""
        return cls(
            tokens=budgets.tokens,
            patches=budgets.patches,
            audio_frames=budgets.audio_frames,
            audio_targets=budgets.audio_targets,
            text_targets=budgets.text_targets,
            mel_windows=budgets.mel_windows,
            visual_tokens=budgets.patches // omni.vision.merged_patches,
            patch_values=omni.vision.patch_values,
            levels=omni.audio.levels,
            mel_frames=mel_frames,
            mel_bins=omni.audio.num_mel_bins,
        )


@dataclass(frozen=True)
class BatchField:
    """One field of a packed batch.

    `axes` are the logical axes of the array, rows first (`ShardingRules` maps them to the mesh). `shape` is that of a
    row: names of `BatchSizes`, or numbers. `padding` is what unused places hold: a number, or the size that it is,
    one past the last place that an index of slots can point to.
    """

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[str | int, ...]
    dtype: Literal["int32", "float32", "uint8"] = "int32"
    padding: int | str = 0

    def row_shape(self, sizes: BatchSizes) -> tuple[int, ...]:
        """Returns the shape of one row."""
        return tuple(_resolve(size, sizes) for size in self.shape)

    def empty(self, rows: int, sizes: BatchSizes) -> Shaped[np.ndarray, "b ..."]:
        """Returns the field of `rows` rows that hold nothing but padding."""
        return np.full((rows, *self.row_shape(sizes)), _resolve(self.padding, sizes), self.dtype)


def _resolve(size: int | str, sizes: BatchSizes) -> int:
    return size if isinstance(size, int) else getattr(sizes, size)


# Media are split apart from tokens: a shard's media need not belong to its own tokens (`merge.py`).
_TOKEN, _MEDIA = ("batch", "length"), ("batch", "media")

FIELDS: dict[str, BatchField] = {
    field.name: field
    for field in (
        # One value a token. Positions restart with each document, segment ids ascend from 1, 0 is padding.
        BatchField("tokens", _TOKEN, ("tokens",)),
        BatchField("positions", _TOKEN, ("tokens",)),
        BatchField("segment_ids", _TOKEN, ("tokens",)),
        BatchField("document_ids", _TOKEN, ("tokens",), padding=-1),
        BatchField("source_ids", _TOKEN, ("tokens",), padding=-1),
        BatchField("text_targets", _TOKEN, ("tokens",)),
        BatchField("text_weights", _TOKEN, ("tokens",), "float32"),
        # The slots that have a text loss, in no order; none without a budget of them.
        BatchField("text_target_index", _TOKEN, ("text_targets",), padding="tokens"),
        # Audio code frames and the slots of the row that hold them; frames to predict and the slots that do.
        BatchField("audio_codes", (*_MEDIA, None), ("audio_frames", "levels")),
        BatchField("audio_index", _MEDIA, ("audio_frames",), padding="tokens"),
        BatchField("audio_targets", (*_MEDIA, None), ("audio_targets", "levels")),
        BatchField("audio_weights", (*_MEDIA, None), ("audio_targets", "levels"), "float32"),
        BatchField("audio_target_index", _MEDIA, ("audio_targets",), padding="tokens"),
        BatchField("audio_target_sources", _MEDIA, ("audio_targets",), padding=-1),
        # Patches of images and video frames as raw bytes: the device normalizes them.
        BatchField("patches", (*_MEDIA, None), ("patches", "patch_values"), "uint8"),
        BatchField("patch_grid", (*_MEDIA, None), ("patches", 2)),
        BatchField("patch_segments", _MEDIA, ("patches",)),
        BatchField("visual_index", _MEDIA, ("visual_tokens",), padding="tokens"),
        # Log mels, one window of a clip a slot, where the audio tokenizer runs in the step.
        BatchField("mel", (*_MEDIA, None, None), ("mel_windows", "mel_frames", "mel_bins"), "float32"),
        BatchField("mel_lengths", _MEDIA, ("mel_windows",)),
        BatchField("mel_owner", _MEDIA, ("mel_windows",)),
        BatchField("mel_audio", _MEDIA, ("mel_windows",), padding="audio_frames"),
    )
}
BATCH_AXES = {name: field.axes for name, field in FIELDS.items()}
# Logical axes by the branch that reads the field. Only rows with `budgets.mel_windows` have the audio encoder's.
BRANCH_FIELDS = {branch.name: {name: BATCH_AXES[name] for name in branch.batch_fields} for branch in BRANCHES.values()}


def empty_batch(names: Iterable[str], rows: int, sizes: BatchSizes) -> dict[str, Shaped[np.ndarray, "b ..."]]:
    """Returns rows that hold nothing but padding, of these fields.

    >>> empty_batch(["tokens", "audio_index"], 1, BatchSizes(tokens=3, audio_frames=2))["audio_index"].tolist()
    [[3, 3]]
    """
    return {name: FIELDS[name].empty(rows, sizes) for name in names}


def abstract_batch(
    rows: int,
    budgets: Budgets,
    omni: OmniConfig,
    branches: Sequence[str],
    mesh: Mesh,
    rules: ShardingRules,
    mel_frames: int = 0,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch: what a step is compiled for.

    Args:
        rows: rows of the global batch.
        budgets: what one row holds at most.
        omni: the model's sizes.
        branches: the branches that read the batch; it has their fields.
        mesh: the devices that share it.
        rules: which mesh axes each logical axis is split over.
        mel_frames: frames of a mel slot (0: whole windows of 30 s).

    Returns:
        Field name -> shape, dtype and sharding.

    Raises:
        ConfigError: the mesh does not divide a field; the message names the field and the dimension.
    """
    import jax
    from jax.sharding import NamedSharding

    from baichuan_omni_jax.sharding import axis_product, check_divisible

    merged = omni.vision.merged_patches
    # No visual token may straddle a shard: the tower merges its patches without communication.
    if budgets.patches % (merged * axis_product(mesh, rules.axes("media"))):
        raise ConfigError(
            f"data.budgets.patches {budgets.patches} is not divisible by {merged} patches a token x "
            f"{axis_product(mesh, rules.axes('media'))}, the mesh axes {' x '.join(rules.axes('media'))}"
        )
    sizes = BatchSizes.from_config(budgets, omni, mel_frames or omni.audio.max_mel_frames)
    abstract = {}
    for name in (name for branch in branches for name in BRANCH_FIELDS[branch]):
        field = FIELDS[name]
        shape = (rows, *field.row_shape(sizes))
        split = tuple(axis for axis in field.axes if axis is not None)  # the first two: rows, and what they hold
        check_divisible(mesh, rules, shape[: len(split)], split, f"batch field {name}")
        sharding = NamedSharding(mesh, rules.spec(*field.axes))
        abstract[name] = jax.ShapeDtypeStruct(shape, field.dtype, sharding=sharding)
    return abstract
