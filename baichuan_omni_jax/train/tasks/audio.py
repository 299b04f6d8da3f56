"""What the tasks that train on sound share: fields of the batch, checks, counts."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int32, PRNGKeyArray

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec, run_mel_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, Batch, abstract_batch
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.input import check_batch
from baichuan_omni_jax.train.tasks.task import Metrics

_ROWS = ("llm", "audio_encoder")
_STEPS = 1 << 20  # sets the steps' draws apart from those of the first weights, which split the same key


def sound_axes(targets: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of the fields of rows with mel slots and these targets."""
    axes = {name: axes for branch in _ROWS for name, axes in BRANCH_FIELDS[branch].items()}
    axes["audio_index"] = BRANCH_FIELDS["audio_head"]["audio_index"]
    for name in targets:
        axes |= {f"target_{name}": ("batch", "media", None, None), f"target_{name}_lengths": ("batch", "media")}
    return axes


def step_key(run: RunConfig, step: Int32[Array, ""]) -> PRNGKeyArray:
    """Returns the key of all that a step draws: it goes by `train.seed` and the step alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(run.train.seed), _STEPS), step)


def slot_frames(run: RunConfig, omni: OmniConfig) -> int:
    """Mel frames of the largest slot."""
    return max(run.data.mel_frames, default=omni.audio.max_mel_frames)


def sound_batch(run: RunConfig, omni: OmniConfig, mesh: Mesh, rules: ShardingRules) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch with the largest slots."""
    data, frames, targets = run.data, slot_frames(run, omni), run_mel_targets(run, omni)
    shapes = abstract_batch(
        data.rows, data.budgets, omni, ("llm", "audio_encoder", "audio_head"), mesh, rules, mel_frames=frames
    )
    slots = (data.rows, data.budgets.mel_windows)
    for name, target in targets.items():
        shapes[f"target_{name}"] = _media((*slots, slot_target_frames(target, frames, omni), target.mels), mesh, rules)
        shapes[f"target_{name}_lengths"] = _media(slots, mesh, rules, jnp.int32)
    return {name: shapes[name] for name in sound_axes(tuple(targets))}


def slot_target_frames(target: MelTargetSpec, mel_frames: int, omni: OmniConfig) -> int:
    """Frames of a target's slot beside a mel slot of `mel_frames`."""
    return target.frames(mel_frames * omni.audio.hop_length * target.rate // omni.audio.sampling_rate)


def check_sound(
    run: RunConfig, omni: OmniConfig, mesh: Mesh, compute: ComputePolicy, branches: Sequence[str], needed: Sequence[str]
) -> None:
    """Raises ConfigError where branches, budgets, accumulation or mesh do not fit a task that trains on sound."""
    unknown = [name for name in run.branches if name not in branches]
    missing = [name for name in needed if name not in run.branches]
    if unknown or missing:
        raise ConfigError(f"branches {', '.join(run.branches)}: task {run.task} has {', '.join(branches)}")
    if run.data.budgets.mel_windows < 1:
        raise ConfigError(f"data.budgets.mel_windows must be at least 1: task {run.task} learns from sound")
    if run.train.accumulate != 1:
        raise ConfigError(f"train.accumulate must be 1: task {run.task} takes its batch whole")
    if run.train.document_weighting != "token":
        raise ConfigError(f"train.document_weighting must be token: task {run.task} weighs sound by its length")
    for source in run.data.mixture:
        if source.loss_weight != 1:
            raise ConfigError(
                f"source {source.name}: loss_weight must be 1 in task {run.task}, not {source.loss_weight}"
            )
    check_batch(replace(run, branches=_ROWS), omni, mesh, compute.rules)
    sound_batch(run, omni, mesh, compute.rules)


def sound_numbers(batch: Batch, omni: OmniConfig) -> Metrics:
    """Real tokens, clips and seconds of sound of the global batch; the used share of tokens and of mel slots."""
    real, lengths = batch["segment_ids"] > 0, batch["mel_lengths"]
    frames = lengths.sum(dtype=jnp.float32)
    return {
        "tokens": real.sum(dtype=jnp.float32),
        "clips": (lengths > 0).sum(dtype=jnp.float32),
        "seconds": frames * (omni.audio.hop_length / omni.audio.sampling_rate),
        "fill_tokens": jnp.mean(real, dtype=jnp.float32),
        "fill_mel": frames / (lengths.size * batch["mel"].shape[2]),
    }


def _media(shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, rules.spec("batch", "media", *[None] * (len(shape) - 2)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
