"""What the loop asks of a task: a model, a batch, a loss, and what a step moves beside the optimizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.flops.terms import FlopTerm
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.groups import untrained_targets

Metrics = dict[str, Float[Array, ""]]
Values = Mapping[str, Any]


class Moved(NamedTuple):
    """What a step changed that no gradient does: model parameters by dotted name, and `extra`, the task's own state."""

    values: dict[str, Array]
    extra: Any


NOTHING = Moved({}, ())


@runtime_checkable
class Task(Protocol):
    """A model and how it learns. A model has `branches`, the names under which its parts are saved.

    `extra` is a pytree of arrays beside the parameters (counters, running means), () where there is none: it is saved
    with the optimizer's state and comes back from every step.
    """

    run: RunConfig
    omni: OmniConfig
    compute: ComputePolicy
    weight_decay: float  # where the run's optimizer names none

    def make_model(self, key: PRNGKeyArray) -> nnx.Module:
        """The model with random parameters."""

    def moves(self, name: str) -> bool:
        """Whether a step changes this parameter without a gradient: it is kept in fp32."""

    def first_extra(self, trainable: Values) -> Any:
        """`extra` at step 0."""

    def check(self, mesh: Mesh) -> None:
        """Raises ConfigError naming the number of the configuration that does not fit, alone or on the mesh."""

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of every field that a step reads."""

    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of the largest batch."""

    def weigh(self, batch: Batch) -> Batch:
        """The batch with the weights that its losses count by."""

    def denominators(self, batch: Batch) -> Any:
        """What the losses of a whole global batch are divided by."""

    def loss(
        self, model: nnx.Module, batch: Batch, by: Any, extra: Any
    ) -> tuple[Float[Array, ""], tuple[Metrics, Moved]]:
        """The loss of (a part of) a batch; its numbers for the report; what it moves."""

    def finish(self, extra: Any, trainable: Values) -> Any:
        """`extra` after the update."""

    def saved(self, values: Values, extra: Any) -> tuple[Values, Any]:
        """Parameters and `extra` as a checkpoint holds them; of those it holds, as a run does."""

    def batch_numbers(self, batch: Batch) -> Metrics:
        """What the batch held, for the report."""

    def parts(self) -> tuple[FlopTerm, ...]:
        """Every matrix product of a step: what model FLOPs are counted from."""

    def counts(self, batch: Batch) -> Metrics:
        """What the batch held, `tokens` and all that `parts` count."""


class PlainTask:
    """The parts of a task that has no state beside parameters and optimizer."""

    weight_decay = 0.0

    def __init__(self, run: RunConfig, omni: OmniConfig, compute: ComputePolicy):
        self.run, self.omni, self.compute = run, omni, compute

    def moves(self, name: str) -> bool:
        return False

    def weigh(self, batch: Batch) -> Batch:
        """Text weights are 0 where the target is a special token whose row of the head does not train."""
        ids = untrained_targets(self.run, self.omni) if "llm" in self.run.branches else ()
        if not ids:
            return batch
        asked = (batch["text_targets"][..., None] == jnp.asarray(ids, jnp.int32)).any(-1)
        return batch | {"text_weights": jnp.where(asked, 0.0, batch["text_weights"])}

    def first_extra(self, trainable: Values) -> Any:
        return ()

    def finish(self, extra: Any, trainable: Values) -> Any:
        return extra

    def saved(self, values: Values, extra: Any) -> tuple[Values, Any]:
        return values, extra
