"""Rows with mel slots: what a batch of the audio tasks must be, and the shapes and axes of its fields."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec, run_mel_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, abstract_batch
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.input import check_batch

_ROWS = ("llm", "audio_encoder")


def check_audio_run(
    run: RunConfig,
    omni: OmniConfig,
    mesh: Mesh,
    compute: ComputePolicy,
    branches: Sequence[str],
    required: Sequence[str],
) -> None:
    """Raises ConfigError where the configuration does not fit a task that trains on audio.

    Args:
        run: its branches, budgets, accumulation and weights are checked.
        omni: the model's sizes.
        mesh: must divide the batch.
        compute: its rules split the batch.
        branches: those that the task has.
        required: those that it cannot do without.
    """
    # Branches first: the rest makes no sense for others.
    unknown = [name for name in run.branches if name not in branches]
    missing = [name for name in required if name not in run.branches]
    if unknown or missing:
        raise ConfigError(f"branches {', '.join(run.branches)}: task {run.task} has {', '.join(branches)}")
    if run.data.budgets.mel_windows < 1:
        raise ConfigError(f"data.budgets.mel_windows must be at least 1: task {run.task} learns from audio")
    # Codebooks are updated from the whole batch, and the losses are means of frames.
    if run.train.accumulate != 1:
        raise ConfigError(f"train.accumulate must be 1: task {run.task} takes its batch whole")
    if run.train.document_weighting != "token":
        raise ConfigError(f"train.document_weighting must be token: task {run.task} weighs audio by its length")
    for source in run.data.mixture:
        if source.loss_weight != 1:
            raise ConfigError(
                f"source {source.name}: loss_weight must be 1 in task {run.task}, not {source.loss_weight}"
            )
    # Rows and tokens divide as in language stages; then mel slots and targets.
    check_batch(replace(run, branches=_ROWS), omni, mesh, compute.rules)
    abstract_mel_batch(run, omni, mesh, compute.rules)


def mel_batch_axes(targets: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of the fields of rows with mel slots and these targets."""
    axes = {name: axes for branch in _ROWS for name, axes in BRANCH_FIELDS[branch].items()}
    axes["audio_index"] = BRANCH_FIELDS["audio_head"]["audio_index"]
    for name in targets:
        axes |= {f"target_{name}": ("batch", "media", None, None), f"target_{name}_lengths": ("batch", "media")}
    return axes


def abstract_mel_batch(
    run: RunConfig, omni: OmniConfig, mesh: Mesh, rules: ShardingRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes a batch with the largest slots by shapes and shardings."""
    # A row's own fields, then a slot for each target beside each mel slot.
    data, frames, targets = run.data, slot_frames(run, omni), run_mel_targets(run, omni)
    branches = ("llm", "audio_encoder", "audio_head")
    shapes = abstract_batch(data.rows, data.budgets, omni, branches, mesh, rules, mel_frames=frames)
    slots = (data.rows, data.budgets.mel_windows)
    for name, target in targets.items():
        shapes[f"target_{name}"] = _media((*slots, slot_target_frames(target, frames, omni), target.mels), mesh, rules)
        shapes[f"target_{name}_lengths"] = _media(slots, mesh, rules, jnp.int32)
    return {name: shapes[name] for name in mel_batch_axes(tuple(targets))}


def slot_frames(run: RunConfig, omni: OmniConfig) -> int:
    """Counts the mel frames of the largest slot."""
    return max(run.data.mel_frames, default=omni.audio.max_mel_frames)


def slot_target_frames(target: MelTargetSpec, mel_frames: int, omni: OmniConfig) -> int:
    """Counts the frames of a target's slot beside a mel slot of `mel_frames`."""
    return target.frames(mel_frames * omni.audio.hop_length * target.rate // omni.audio.sampling_rate)


def _media(shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, rules.spec("batch", "media", *[None] * (len(shape) - 2)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
