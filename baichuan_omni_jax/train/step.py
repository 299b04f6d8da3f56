"""One training step: losses over a packed global batch, gradients, update, metrics."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.remat import split_parts
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.optimizers import learning_rates
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState
from baichuan_omni_jax.train.tasks.task import Metrics, NonGradientUpdates

# Collectives go to the SparseCores of a chip that has them, which move bytes while its other cores compute: as the
# compiler leaves them, gathers of weights and sums of gradients stop the chip. Not the options that fuse collectives
# with computation (`xla_tpu_enable_async_collective_fusion...`): libtpu says that on these chips they corrupt results.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_enable_all_reduce_offload_tracing": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
# What the step is compiled with, by `jax.Device.device_kind`; other programs and other chips have no options.
COMPILER_OPTIONS = {"TPU v5": _SPARSE_CORE, "TPU v6 lite": _SPARSE_CORE}


def compiler_options(device_kind: str, given: Sequence[str] = ()) -> dict[str, str]:
    """Returns the options that a step is compiled with: those of the chip, then those `given` as NAME=VALUE.

    >>> compiler_options("cpu", ["xla_cpu_enable_fast_math=false"])
    {'xla_cpu_enable_fast_math': 'false'}

    Raises ConfigError on one that is not of that form.
    """
    options = dict(COMPILER_OPTIONS.get(device_kind, {}))
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"compute.compiler_options: {item!r} is not of the form NAME=VALUE")
        options[name] = value
    return options


class Gradients(NamedTuple):
    """Gradients by the parameters' names, the losses and numbers of the batch, and what changes without a gradient."""

    by_name: Arrays
    metrics: Metrics
    updates: NonGradientUpdates


def train_step(
    state: TrainState, batch: Batch, spec: StepSpec, computed: Gradients | None = None
) -> tuple[TrainState, Metrics]:
    """Updates the state by one packed global batch.

    Args:
        state: what the step before returned.
        batch: every field of `spec.task.abstract_batch`, split over the mesh.
        spec: the task, its model's structure, groups and optimizer; static.
        computed: what `compute_gradients` returned for the same arguments, where it ran as a program of its own.

    Returns:
        The state after the step, and its metrics, fp32 scalars: the task's, and those of `group_metrics`. Where the
        loss or the gradient's norm is not finite, parameters and states come back as they were, bit for bit (`step`
        counts on), and `nonfinite` is 1, else 0.
    """
    # Denominators, losses and gradients, in one part or accumulated over several.
    gradients, metrics, updates = compute_gradients(state, batch, spec) if computed is None else computed

    with jax.named_scope("optimizer"):
        # Clipping goes by the norm of all gradients together: the one place of the update where devices wait.
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

        # Optimizer, then what a task keeps beside it (codebook counters, running means of the new weights).
        changes, opt_state = spec.optimizer.update(gradients, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, changes)
        aux_state = spec.task.update_aux(updates.aux_state, trainable)

        # Keep if finite. A select, not a branch: the program is the same for every batch, and nothing is copied.
        old = {name: state.frozen[name] for name in updates.parameters}
        trainable, opt_state, replaced, aux_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trainable, opt_state, updates.parameters, aux_state),
            (state.trainable, state.opt_state, old, state.aux_state),
        )

        by_group = group_metrics(spec, gradients, cast(Arrays, changes), state)

    new = TrainState(state.step + 1, trainable, {**state.frozen, **replaced}, opt_state, aux_state)
    return new, metrics | by_group | {"gradient_norm": norm, "nonfinite": 1.0 - finite}


def group_metrics(spec: StepSpec, gradients: Arrays, changes: Arrays, state: TrainState) -> Metrics:
    """Measures each group that trains: what it is pushed by, how large it is, how far it goes, and at which rate.

    Args:
        spec: its groups and their schedules.
        gradients: by name, before clipping.
        changes: what the optimizer adds to the parameters by name, learning rate and weight decay included.
        state: the state before the update.

    Returns:
        `gradient_norm/GROUP`, `parameter_norm/GROUP`, `update_norm/GROUP`, `learning_rate/GROUP`, fp32 scalars.
    """
    metrics: Metrics = {}
    labels = spec.groups.trainable
    kinds = {"gradient_norm": gradients, "parameter_norm": state.trainable, "update_norm": changes}
    for group in dict.fromkeys(labels.values()):
        for kind, arrays in kinds.items():
            metrics[f"{kind}/{group}"] = optax.global_norm([arrays[name] for name in labels if labels[name] == group])
    rates = learning_rates(spec.task.run.optimizer, state.opt_state)
    return metrics | {f"learning_rate/{group}": rate for group, rate in rates.items()}


def compute_gradients(state: TrainState, batch: Batch, spec: StepSpec) -> Gradients:
    """Differentiates the task's loss over the batch, in `train.accumulate` parts one after the other."""
    task, parts = spec.task, spec.task.run.train.accumulate

    # Denominators: sums of weights over the whole global batch, so that the parts' losses and gradients add up.
    batch = task.mask_untrained_targets(batch)
    denominators = task.denominators(batch)

    def part_gradients(batch: Batch, part: Int32[Array, ""] | int = 0) -> tuple[Arrays, Metrics, NonGradientUpdates]:
        def loss(trainable: Arrays):
            model = spec.assemble(trainable, state.frozen)
            if task.compute.int8:
                # Of step and part alone: a resumed run rounds as the uninterrupted one does.
                key = jax.random.fold_in(jax.random.key(task.run.train.seed), state.step)
                model.llm.dither_key = jax.random.fold_in(key, part)
            return task.loss(model, batch, denominators, state.aux_state)

        gradients, (metrics, updates) = jax.grad(loss, has_aux=True)(state.trainable)
        return gradients, metrics, updates

    if parts == 1:
        gradients, metrics, updates = part_gradients(batch)
    else:
        # Accumulation: a scan, so that one part's activations are in memory at a time; sums are of fp32 numbers.
        fields = {name: split_parts(field, parts) for name, field in batch.items()}
        shapes = jax.eval_shape(part_gradients, jax.tree.map(lambda field: field[0], fields))
        zeros = jax.tree.map(lambda shape: jnp.zeros_like(shape, jnp.float32), shapes)

        def add(total, part: tuple[Batch, Int32[Array, ""]]):
            found = part_gradients(*part)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), total, found), None

        (gradients, metrics, updates), _ = jax.lax.scan(add, zeros, (fields, jnp.arange(parts, dtype=jnp.int32)))
    return Gradients(gradients, metrics | task.batch_metrics(batch), updates)


class CompiledStep:
    """`train_step` for the devices of `spec.mesh`: state, batch -> state, metrics.

    The state that it is given is donated, but for the frozen parameters: those go in and are not given back (they would
    be copied), only the few that the task changes are.

    On CPU nothing is donated, and gradients and update are two programs. In one, XLA's concurrent CPU runtime was seen
    to get the gradients right but their global norm wrong in some calls (jax 0.10.2;
    https://github.com/jax-ml/jax/issues/39741 looks like it), and a resumed run must repeat the uninterrupted one
    exactly.
    """

    def __init__(self, spec: StepSpec) -> None:
        def step(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
            return _only_changed(*train_step(replace(state, frozen=frozen), batch, spec), spec)

        def gradients(state: TrainState, batch: Batch) -> Gradients:
            return compute_gradients(state, batch, spec)

        def update(state: TrainState, computed: Gradients) -> tuple[TrainState, Metrics]:
            return _only_changed(*train_step(state, {}, spec, computed), spec)

        # Compiled at their first call; of these programs a run uses one or two.
        device = spec.mesh.devices.flat[0]
        self._two_programs = device.platform == "cpu"
        self.options = options = compiler_options(device.device_kind, spec.task.run.compute.compiler_options)
        self._step = jax.jit(step, donate_argnums=0, compiler_options=options)
        self._gradients, self._update = jax.jit(gradients, compiler_options=options), jax.jit(update)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if self._two_programs:
            new, metrics = self._update(state, self._gradients(state, batch))
        else:
            new, metrics = self._step(replace(state, frozen={}), state.frozen, batch)
        return replace(new, frozen={**state.frozen, **new.frozen}), metrics

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Lowers the step as one program, for shapes with shardings: what preflight compiles."""
        return self._step.lower(replace(state, frozen={}), state.frozen, batch)


def compile_step(spec: StepSpec) -> CompiledStep:
    """Returns the step as a run calls it; it compiles at its first call, with `spec.mesh` set."""
    return CompiledStep(spec)


def _only_changed(state: TrainState, metrics: Metrics, spec: StepSpec) -> tuple[TrainState, Metrics]:
    """Leaves out the frozen parameters that came through as they were."""
    changes: Callable[[str], bool] = spec.task.changes_without_gradient
    return replace(state, frozen={name: value for name, value in state.frozen.items() if changes(name)}), metrics


class StepReplay:
    """Says which arrays of a step's result differ between two calls of one program on the same state and batch.

    Of the result only sums of its bits leave the program, so that it needs little more memory than the step, and the
    state is not donated. Two programs may round differently: the step of the run itself is not compared.
    """

    def __init__(self, spec: StepSpec) -> None:
        def gradients(state: TrainState, batch: Batch) -> Gradients:
            return compute_gradients(state, batch, spec)

        def sums(state: TrainState, batch: Batch, computed: Gradients | None = None) -> Arrays:
            new, metrics = train_step(state, batch, spec, computed)
            results = {
                "parameter": new.trainable,
                "optimizer": new.opt_state,
                "state": new.aux_state,
                "number": metrics,
            }
            leaves = jax.tree_util.tree_leaves_with_path(results)
            return {jax.tree_util.keystr(path, simple=True, separator=" "): bit_sum(leaf) for path, leaf in leaves}

        # On CPU as the step itself (`CompiledStep`): in two programs.
        self._two_programs = spec.mesh.devices.flat[0].platform == "cpu"
        self._gradients, self._sums = jax.jit(gradients), jax.jit(sums)

    def __call__(self, state: TrainState, batch: Batch) -> list[str]:
        """Computes the next step twice; returns the names of what differs, none where all is well. Waits for both."""
        first, second = (jax.device_get(self._compute(state, batch)) for _ in range(2))
        return [name for name in first if first[name] != second[name]]

    def _compute(self, state: TrainState, batch: Batch) -> Arrays:
        if self._two_programs:
            return self._sums(state, {}, self._gradients(state, batch))
        return self._sums(state, batch)


def bit_sum(value: jax.Array) -> jax.Array:
    """Sums an array's bits as unsigned integers modulo 2^32: one flipped bit changes it, the order does not."""
    kind = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
    bits = value if value.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(value, kind)
    return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
