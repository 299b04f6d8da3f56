"""The training state: flat dicts of arrays by dotted name, and the module they are put back into."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from baichuan_omni_jax.checkpoint import load_branches, with_shardings
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.linear import ROWS, SpecialRows, put_rows, take_rows
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, named_variables, with_values
from baichuan_omni_jax.nn.remat import parse_remat
from baichuan_omni_jax.train.groups import Groups, assign_groups, special_ids
from baichuan_omni_jax.train.optimizers import make_optimizer
from baichuan_omni_jax.train.tasks.audio import AudioTokenizerTask, FlowMatchingTask
from baichuan_omni_jax.train.tasks.omni import OmniTask
from baichuan_omni_jax.train.tasks.task import Task
from baichuan_omni_jax.train.transcript_reader import read_audio_embeddings

HOST_MEMORY = "pinned_host"
# `compute.remat` that is settled by compiling (`preflight/fit.py`), before the step is.
FIT = "fit"
# Arrays by dotted name; shapes (`jax.ShapeDtypeStruct`) stand for them until a run starts.
Arrays = dict[str, Any]


class SavedOptState(NamedTuple):
    """What `opt_state/` of a checkpoint holds where the task has a state of its own (`Task.init_aux_state`).

    The names are the layout on disk.
    """

    optimizer: Any
    extra: Any


@dataclass(frozen=True)
class StepSpec:
    """What a step is compiled for: the task, its abstract model (leaves ShapeDtypeStructs), groups and optimizer.

    `template` is the model as a step computes with it, frozen parameters in `train.frozen_dtype`; `stored` the same as
    checkpoints hold it, nothing rounded. `special_ids` are the tokens whose rows of `groups.rows` train.
    """

    task: Task
    template: nnx.Module
    groups: Groups
    optimizer: optax.GradientTransformation
    mesh: Mesh
    stored: nnx.Module
    special_ids: tuple[int, ...] = ()

    def assemble(self, trainable: Arrays, frozen: Arrays) -> Any:
        """Puts these arrays into the model, which is of the task's own class."""
        values = trainable | frozen
        model: Any = with_values(self.template, values)
        if self.groups.rows:
            # By the names of the module's tables: `embedding`, `head`.
            rows = {table.split(".")[-1]: values[name] for table, name in self.groups.rows.items()}
            model.llm.special_rows = SpecialRows(self.special_ids, **rows)
        return model

    def shapes(self) -> Arrays:
        """Describes shape, dtype and sharding of every array of `trainable` and `frozen`, by name."""
        shapes = named_values(self.template)
        for table, name in self.groups.rows.items():
            sharding = NamedSharding(self.mesh, self.task.compute.rules.spec(*ROWS))
            shape = (len(self.special_ids), shapes[table].shape[1])
            shapes[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        return shapes

    def split(self, values: Arrays) -> tuple[Arrays, Arrays]:
        """Splits all arrays by whether they train."""
        return (
            {name: values[name] for name in self.groups.trainable},
            {name: values[name] for name in self.groups.frozen},
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step takes and returns, as one pytree.

    `step` counts finished steps (int32). `trainable` are fp32, `frozen` get no gradient and no optimizer state;
    `aux_state` is the task's own (codebook counters, running means), () where it has none.
    """

    step: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any = ()
    aux_state: Any = ()


def make_compute(run: RunConfig) -> ComputePolicy:
    """Makes the static settings of every module.

    Raises ConfigError on an unknown `compute.remat`, and on int8 products where no language model trains. A policy that
    is not settled yet (`fit`) keeps nothing: for checks on shapes, which are the same.
    """
    if run.compute.quantize != "none" and run.task != "omni":
        raise ConfigError(f"compute.quantize {run.compute.quantize!r} is for the task 'omni' alone, not {run.task!r}")
    remat = "full" if run.compute.remat == FIT else run.compute.remat
    parse_remat(remat)
    return ComputePolicy(
        dtype=jnp.dtype(run.compute.dtype),
        remat=remat,
        attention=run.compute.attention or None,
        # "auto" is settled when the data are there (`train/run.py`); shapes do not depend on it.
        attention_block=512 if run.compute.attention_block == "auto" else run.compute.attention_block,
        attention_q_block=run.compute.attention_q_block,
        attention_kv_block=run.compute.attention_kv_block,
        mlp_chunk=run.compute.mlp_chunk,
        int8=run.compute.quantize == "int8",
    )


# By the name in a run's configuration.
TASKS: dict[str, type[Task]] = {
    "omni": OmniTask,
    "audio_tokenizer": AudioTokenizerTask,
    "flow_matching": FlowMatchingTask,
}


def make_task(run: RunConfig, omni: OmniConfig, compute: ComputePolicy) -> Task:
    """Makes the task that `run.task` names. Raises ConfigError on an unknown one."""
    if run.task not in TASKS:
        raise ConfigError(f"task {run.task!r} is not one of {', '.join(TASKS)}")
    return TASKS[run.task](run, omni, compute)


def make_step_spec(run: RunConfig, omni: OmniConfig, mesh: Mesh, compute: ComputePolicy) -> StepSpec:
    """Puts together task, abstract model, groups and optimizer of a run, on shapes alone.

    Raises ConfigError on an unknown task, and where mesh, groups and model do not fit.
    """
    task = make_task(run, omni, compute)
    model = jax.eval_shape(lambda: task.make_model(jax.random.key(0)))
    rows = run.train.special_token_rows
    groups = assign_groups(named_variables(model), run.optimizer.groups, special_token_rows=rows)

    # Checkpoints keep frozen parameters as they were; a step computes from them in `train.frozen_dtype`. Those that a
    # task changes without a gradient stay fp32: small changes would be rounded away.
    stored = with_shardings(model, mesh, compute.rules)
    frozen_dtype = jnp.dtype(run.train.frozen_dtype)
    still = {name for name in groups.frozen if not task.changes_without_gradient(name)}
    template = with_values(
        stored,
        {name: _cast(shape, frozen_dtype) if name in still else shape for name, shape in named_values(stored).items()},
    )
    optimizer = make_optimizer(run.optimizer, groups.trainable, task.weight_decay)
    ids = special_ids(run, omni) if groups.rows else ()
    return StepSpec(task, template, groups, optimizer, mesh, stored, ids)


def init_state(run: RunConfig, spec: StepSpec) -> tuple[TrainState, Arrays]:
    """Draws random parameters from `train.seed`, then reads the branches that `checkpoint.init_from` names.

    Returns:
        The state at step 0; and the originals (`from_checkpoint`).
    """
    shardings = {name: shape.sharding for name, shape in named_values(spec.stored).items()}
    # Drawn where they will lie: no device ever holds a whole model.
    draw = jax.jit(lambda key: named_values(spec.task.make_model(key)), out_shardings=shardings)
    values = draw(jax.random.key(run.train.seed))
    if run.checkpoint.init_from:
        loaded = load_branches(run.checkpoint.init_from, branches_of(spec.stored))
        values |= named_values(loaded)
    if path := run.checkpoint.audio_embeddings_from:
        values |= read_audio_embeddings(path, spec.task.omni, spec.task.compute, spec.mesh, values)
    trainable, frozen, originals = _from_stored(spec, values)
    state = jax.jit(lambda trainable: _first_state(spec, trainable))(trainable)
    return replace(state, trainable=trainable, frozen=frozen), originals


def _first_state(spec: StepSpec, trainable: Arrays) -> TrainState:
    """Makes the state at step 0 without its parameters: a program that gave them back would copy them."""
    aux_state = spec.task.init_aux_state(trainable)
    return TrainState(jnp.zeros((), jnp.int32), {}, {}, spec.optimizer.init(trainable), aux_state)


def abstract_state(spec: StepSpec) -> TrainState:
    """Describes the state by shapes and shardings."""
    trainable, frozen = spec.split(spec.shapes())
    # The optimizer's own structure, by tracing its init: moments lie as their parameters, sums over a parameter's rows
    # as what is left of its dims, counts on every device.
    shapes = jax.eval_shape(lambda trainable: _first_state(spec, trainable), trainable)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        parts = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(spec.mesh, parts))

    return replace(jax.tree.map(place, shapes), trainable=trainable, frozen=frozen)


def saved_opt_state(state: TrainState) -> Any:
    """Packs the states of optimizer and task as a checkpoint holds them; of `abstract_state`, the restore target."""
    return SavedOptState(state.opt_state, state.aux_state) if jax.tree.leaves(state.aux_state) else state.opt_state


def branches_of(model: Any) -> dict[str, nnx.Module]:
    """Lists the model's branches under the names that checkpoints use."""
    return {name: getattr(model, name) for name in model.branches}


def to_checkpoint(spec: StepSpec, state: TrainState, originals: Arrays) -> tuple[dict[str, nnx.Module], Any]:
    """Makes the branches and the optimizer's state that a checkpoint holds: unrounded, trained rows in their tables."""
    values, aux_state = spec.task.to_checkpoint(state.trainable | state.frozen, state.aux_state)
    values = {**values, **originals}
    for table, name in spec.groups.rows.items():
        # Rows go back into their table, which may lie in the hosts' memory.
        whole = _move(values[table], named_values(spec.stored)[table].sharding.memory_kind)
        values[table] = put_rows(whole, values[name], spec.special_ids)
    return branches_of(with_values(spec.stored, values)), saved_opt_state(replace(state, aux_state=aux_state))


def from_checkpoint(
    spec: StepSpec, branches: dict[str, nnx.Module], opt_state: Any, step: int
) -> tuple[TrainState, Arrays]:
    """Makes the state of restored branches.

    Returns:
        The state; and the originals, in the hosts' memory: the frozen parameters that `train.frozen_dtype` cannot hold,
        as they were. No step reads them, every checkpoint does.
    """
    saved = opt_state if isinstance(opt_state, SavedOptState) else SavedOptState(opt_state, ())
    values, aux_state = spec.task.from_checkpoint(named_values(branches), saved.extra)
    trainable, frozen, originals = _from_stored(spec, values)
    replicated = NamedSharding(spec.mesh, PartitionSpec())
    count = jax.jit(lambda: jnp.full((), step, jnp.int32), out_shardings=replicated)()
    return TrainState(count, trainable, frozen, saved.optimizer, aux_state), originals


def evaluation_values(spec: StepSpec, state: TrainState) -> Arrays:
    """Lists all parameters by dotted name, to evaluate: those that a checkpoint holds, as a step computes with them."""
    return dict(spec.task.to_checkpoint(state.trainable | state.frozen, state.aux_state)[0])


def _from_stored(spec: StepSpec, values: Mapping[str, Any]) -> tuple[Arrays, Arrays, Arrays]:
    """Makes (trainable, frozen, originals) of parameters as a checkpoint holds them."""
    # Rows of special tokens train apart from their frozen table.
    values = dict(values)
    for table, name in spec.groups.rows.items():
        values[name], values[table] = take_rows(values[table], spec.special_ids)
    trainable, frozen = spec.split(values)

    # Frozen parameters become those that a step computes from; what that rounds is kept beside them.
    wanted = named_values(spec.template)
    wide = {name: value for name, value in frozen.items() if value.dtype != wanted[name].dtype}
    small = jax.jit(lambda wide: {name: value.astype(wanted[name].dtype) for name, value in wide.items()})(wide)
    # Two programs: in one, XLA may take the way there and back for nothing.
    changed = jax.jit(lambda wide, small: {name: (wide[name] != small[name]).any() for name in wide})(wide, small)
    lost = {name: wide[name] for name, differs in changed.items() if differs}
    # In the hosts' memory, which no step needs; devices without one of that kind keep them.
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    originals = {name: _move(value, HOST_MEMORY) for name, value in lost.items()} if HOST_MEMORY in kinds else lost
    return trainable, frozen | small, originals


def _move(value: Array, memory_kind: Any) -> Array:
    """Puts an array into another memory of the same devices, part by part: no host touches another's."""
    sharding = value.sharding.with_memory_kind(memory_kind)
    if sharding == value.sharding:
        return value
    parts = [
        jax.device_put(part.data, jax.sharding.SingleDeviceSharding(part.device, memory_kind=memory_kind))
        for part in value.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, parts)


def _cast(shape: Array | jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    kept = dtype if jnp.issubdtype(shape.dtype, jnp.floating) else shape.dtype
    return jax.ShapeDtypeStruct(shape.shape, kept, sharding=shape.sharding)
