"""The training state: flat dicts of arrays by dotted name, and the module they are put back into."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from baichuan_omni_jax.checkpoint import load_branches, with_shardings
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.nn.param import Compute, named_values, named_variables, with_values
from baichuan_omni_jax.train.groups import Groups, assign_groups, make_optimizer
from baichuan_omni_jax.train.tasks import Task, make_task

# Abstract ones too: shapes stand for arrays until a run starts.
Arrays = dict[str, Array | jax.ShapeDtypeStruct]


class OptState(NamedTuple):
    """The optimizer's state, and that of a task which has one (`Task.first_extra`)."""

    optimizer: Any
    extra: Any


@dataclass(frozen=True)
class Setup:
    """What a step is compiled for: the task, its abstract model (leaves ShapeDtypeStructs), groups and optimizer."""

    task: Task
    template: nnx.Module
    groups: Groups
    optimizer: optax.GradientTransformation
    mesh: Mesh

    def assemble(self, trainable: Arrays, frozen: Arrays) -> nnx.Module:
        """The model with these arrays in it."""
        return with_values(self.template, trainable | frozen)

    def split(self, values: Arrays) -> tuple[Arrays, Arrays]:
        """All arrays, by whether they train."""
        return (
            {name: values[name] for name in self.groups.trainable},
            {name: values[name] for name in self.groups.frozen},
        )


@dataclass(frozen=True)
class TrainState:
    """Everything a step changes or needs, but the batch. `step` counts finished steps."""

    trainable: Arrays
    frozen: Arrays
    opt_state: Any
    step: int


def make_compute(run: RunConfig) -> Compute:
    """The static settings of every module."""
    return Compute(
        dtype=jnp.dtype(run.compute.dtype),
        remat=run.compute.remat,
        attention=run.compute.attention or None,
        attention_block=run.compute.attention_block,
        mlp_chunk=run.compute.mlp_chunk,
    )


def make_setup(run: RunConfig, omni: OmniConfig, mesh: Mesh, compute: Compute) -> Setup:
    """Task, abstract model, groups and optimizer of a run.

    Raises ConfigError on an unknown task, and where mesh, groups and model do not fit.
    """
    task = make_task(run, omni, compute)
    model = jax.eval_shape(lambda: task.make_model(jax.random.key(0)))
    groups = assign_groups(named_variables(model), run.optimizer.groups)
    model = with_shardings(model, mesh, compute.rules)
    frozen_dtype = jnp.dtype(run.train.frozen_dtype)
    still = {name for name in groups.frozen if not task.moves(name)}
    model = with_values(
        model,
        {name: _cast(shape, frozen_dtype) if name in still else shape for name, shape in named_values(model).items()},
    )
    return Setup(task, model, groups, make_optimizer(run.optimizer, groups.trainable, task.weight_decay), mesh)


def init_state(run: RunConfig, setup: Setup) -> TrainState:
    """Step 0: random parameters from `train.seed`, then the branches that `checkpoint.init_from` names."""
    shapes = named_values(setup.template)
    shardings = {name: shape.sharding for name, shape in shapes.items()}

    def draw(key):
        drawn = named_values(setup.task.make_model(key))
        return {name: value.astype(shapes[name].dtype) for name, value in drawn.items()}

    values = jax.jit(draw, out_shardings=shardings)(jax.random.key(run.train.seed))
    if run.checkpoint.init_from:
        loaded = load_branches(run.checkpoint.init_from, branches_of(setup.template))
        values |= named_values(loaded)
    trainable, frozen = setup.split(values)
    opt_state = jax.jit(lambda trainable: first_opt_state(setup, trainable))(trainable)
    return TrainState(trainable, frozen, opt_state, 0)


def first_opt_state(setup: Setup, trainable: Arrays) -> Any:
    """The optimizer's state at step 0, with the task's where it has one."""
    optimizer, extra = setup.optimizer.init(trainable), setup.task.first_extra(trainable)
    return OptState(optimizer, extra) if jax.tree.leaves(extra) else optimizer


def branches_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """The model's branches under the names that checkpoints use."""
    return {name: getattr(model, name) for name in model.branches}


def abstract_opt_state(setup: Setup) -> Any:
    """Shapes and shardings of the optimizer's state: the restore target. Moments are placed as their parameters."""
    trainable, _ = setup.split(named_values(setup.template))
    shapes = jax.eval_shape(lambda trainable: first_opt_state(setup, trainable), trainable)
    replicated = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())

    def place(path, leaf):
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in trainable), None)
        sharding = trainable[name].sharding if name and leaf.shape == trainable[name].shape else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def to_saved(setup: Setup, state: TrainState) -> tuple[dict[str, nnx.Module], Any]:
    """Branches and optimizer state as a checkpoint holds them."""
    values, opt_state = _exchange(setup, state.trainable | state.frozen, state.opt_state)
    return branches_of(setup.assemble(values, {})), opt_state


def saved_values(setup: Setup, state: TrainState) -> Arrays:
    """All parameters by dotted name, as a checkpoint holds them."""
    return _exchange(setup, state.trainable | state.frozen, state.opt_state)[0]


def from_saved(setup: Setup, branches: dict[str, nnx.Module], opt_state: Any, step: int) -> TrainState:
    """The state of restored branches."""
    values, opt_state = _exchange(setup, named_values(branches), opt_state)
    return TrainState(*setup.split(values), opt_state, step)


def _exchange(setup: Setup, values: Arrays, opt_state: Any) -> tuple[Arrays, Any]:
    if not isinstance(opt_state, OptState):
        return values, opt_state
    values, extra = setup.task.saved(values, opt_state.extra)
    return dict(values), opt_state._replace(extra=extra)


def advance(state: TrainState, trainable: Arrays, moved: Arrays, opt_state: Any) -> TrainState:
    """The state after one more step, in which `moved` of the frozen parameters changed."""
    frozen = state.frozen | moved if moved else state.frozen
    return replace(state, trainable=trainable, frozen=frozen, opt_state=opt_state, step=state.step + 1)


def _cast(shape: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    kept = dtype if jnp.issubdtype(shape.dtype, jnp.floating) else shape.dtype
    return jax.ShapeDtypeStruct(shape.shape, kept, sharding=shape.sharding)
