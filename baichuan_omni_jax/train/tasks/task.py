"""What differs between the things a run can train: a model, its batch and loss, and what a step changes beside them.

`count_batch` and `fill_metrics` measure what a packed batch holds, on device: what FLOP formulas are multiplied by, and
the use of budgets.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.evaluation.held_out import Sums
from baichuan_omni_jax.flops.terms import FlopTerm
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.groups import untrained_targets
from baichuan_omni_jax.train.losses import Metrics

Values = Mapping[str, Any]


class NonGradientUpdates(NamedTuple):
    """What a step changes without a gradient: model parameters by dotted name, and the task's own state."""

    parameters: dict[str, Array]
    aux_state: Any


NO_UPDATES = NonGradientUpdates({}, ())


class Task(ABC):
    """A model and how it learns. A model has `branches`, the names under which its parts are saved.

    `aux_state` is a pytree of arrays beside the parameters (counters, running means), () where there is none: a step
    takes and returns it, checkpoints hold it with the optimizer's state.
    """

    weight_decay: ClassVar[float] = 0.0  # where the run's optimizer names none

    def __init__(self, run: RunConfig, omni: OmniConfig, compute: ComputePolicy):
        self.run, self.omni, self.compute = run, omni, compute

    # The model.

    @abstractmethod
    def make_model(self, key: PRNGKeyArray) -> nnx.Module:
        """Makes the model with random parameters."""

    @abstractmethod
    def check(self, mesh: Mesh) -> None:
        """Raises ConfigError naming the number of the configuration that does not fit, alone or on the mesh."""

    # The batch.

    @abstractmethod
    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Returns the logical axes of every field that a step reads."""

    @abstractmethod
    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Describes the largest batch by shapes and shardings."""

    def mask_untrained_targets(self, batch: Batch) -> Batch:
        """Zeroes text weights where the target is a special token whose row of the head does not train."""
        ids = untrained_targets(self.run, self.omni) if "llm" in self.run.branches else ()
        if not ids:
            return batch
        untrained = (batch["text_targets"][..., None] == jnp.asarray(ids, jnp.int32)).any(-1)
        return batch | {"text_weights": jnp.where(untrained, 0.0, batch["text_weights"])}

    # The loss.

    @abstractmethod
    def denominators(self, batch: Batch) -> Any:
        """Sums what the losses of a whole global batch are divided by."""

    @abstractmethod
    def loss(
        self, model: Any, batch: Batch, denominators: Any, aux_state: Any
    ) -> tuple[Float[Array, ""], tuple[Metrics, NonGradientUpdates]]:
        """Computes the loss of (a part of) a batch.

        Args:
            model: as `make_model` makes it, with the parameters of the step.
            batch: (a part of) the global batch, its untrained targets masked.
            denominators: those of the whole global batch.
            aux_state: the task's own state before the step.

        Returns:
            The loss; and its parts for the report with what the step changes without a gradient.
        """

    @abstractmethod
    def batch_metrics(self, batch: Batch) -> Metrics:
        """Measures what the batch held, for the report."""

    # What a step changes without a gradient.

    def changes_without_gradient(self, name: str) -> bool:
        """Whether a step changes this parameter without a gradient: it is kept in fp32."""
        return False

    def init_aux_state(self, trainable: Values) -> Any:
        """Makes `aux_state` at step 0."""
        return ()

    def update_aux(self, aux_state: Any, trainable: Values) -> Any:
        """Returns `aux_state` after the optimizer's update to `trainable`."""
        return aux_state

    # Checkpoints.

    def to_checkpoint(self, values: Values, aux_state: Any) -> tuple[Values, Any]:
        """Turns parameters and `aux_state` of a run into those that a checkpoint holds."""
        return values, aux_state

    def from_checkpoint(self, values: Values, aux_state: Any) -> tuple[Values, Any]:
        """Turns parameters and `aux_state` of a checkpoint into those of a run."""
        return values, aux_state

    # FLOPs.

    @abstractmethod
    def flop_terms(self) -> tuple[FlopTerm, ...]:
        """Lists every matrix product of a step: what model FLOPs are counted from."""

    def batch_counts(self, batch: Batch) -> Metrics:
        """Counts what the batch held: `tokens` and all that `flop_terms` name."""
        return count_batch(self.mask_untrained_targets(batch))

    # Held-out scores.

    @abstractmethod
    def held_out_sums(self, model: Any, batch: Batch, sources: int) -> Sums:
        """Sums what the held-out scores of a batch are made of; its `source_ids` are 0 .. `sources` - 1."""

    @abstractmethod
    def held_out_means(self, sums: Mapping[str, np.ndarray], sources: tuple[str, ...]) -> dict[str, float]:
        """Makes the scores from sums over batches; those that nothing was summed for are left out."""


def count_batch(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Counts what a packed batch holds, whatever mesh it is split over: fp32 sums, good to 1e-6.

    `tokens`, `patches`, `audio_frames` are real ones, `text_targets` positions with a text loss, `audio_targets` frames
    to predict (end frames too); `causal_pairs` (query, key) pairs of tokens, `patch_pairs` pairs of patches of one
    image. Positions restart with each document, so token blocks may lie in any order; an image's patches lie together,
    on one shard. Fields of a branch that the run lacks may be missing: their counts are 0.
    """
    count = lambda condition: condition.sum(dtype=jnp.float32)  # noqa: E731
    real = batch["segment_ids"] > 0
    found = dict.fromkeys(("patches", "patch_pairs", "audio_frames", "audio_targets"), jnp.zeros(()))
    # A token at position p of its document sees p + 1 keys. int32 would overflow at one document of 65536 tokens.
    found |= {
        "tokens": count(real),
        "causal_pairs": jnp.where(real, batch["positions"] + 1, 0).sum(dtype=jnp.float32),
        "text_targets": count(batch["text_weights"] > 0),
    }
    if "patch_segments" in batch:
        found["patches"] = count(batch["patch_segments"] > 0)
        found["patch_pairs"] = _squared_runs(batch["patch_segments"])
    if "audio_index" in batch:
        found["audio_frames"] = count(batch["audio_index"] < batch["tokens"].shape[1])
    if "audio_weights" in batch:
        found["audio_targets"] = count(batch["audio_weights"][:, :, 0] > 0)
    return found


def fill_metrics(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Measures a global batch: real tokens, and the used share of each budget."""
    real = batch["segment_ids"] > 0
    mean = lambda used: jnp.mean(used, dtype=jnp.float32)  # noqa: E731
    metrics = {"tokens": real.sum(dtype=jnp.float32), "fill_tokens": mean(real)}
    if "patch_segments" in batch:
        metrics["fill_patches"] = mean(batch["patch_segments"] > 0)
    if "audio_index" in batch:
        metrics["fill_audio"] = mean(batch["audio_index"] < real.shape[1])
    if "text_target_index" in batch and batch["text_target_index"].shape[1]:
        metrics["fill_text_targets"] = mean(batch["text_target_index"] < real.shape[1])
    return metrics


def _squared_runs(ids: Int32[Array, "b p"]) -> Float[Array, ""]:
    """Sums n^2 over runs of n equal non-zero ids; the run of a patch is read on its own shard.

    ids [1 1 1 2 0]: places in their run 0 1 2 0, so 1 + 3 + 5 + 1 = 3^2 + 1^2
    """

    def local(ids: Int32[Array, "b p"]) -> Float[Array, "b p"]:
        place = jnp.arange(ids.shape[1])
        starts = jnp.where(ids != jnp.roll(ids, 1, 1), place, 0)
        in_run = place - jax.lax.cummax(starts, axis=1)
        return jnp.where(ids > 0, 2 * in_run + 1, 0).astype(jnp.float32)

    sharding = jax.typeof(ids).sharding
    if not sharding.mesh.empty:
        # No run crosses a shard, so each counts its own and nothing is exchanged but the sum.
        local = jax.shard_map(local, mesh=sharding.mesh, in_specs=(sharding.spec,), out_specs=sharding.spec)
    return local(ids).sum()
