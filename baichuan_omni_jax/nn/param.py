"""Parameters: arrays that know the logical names of their axes, and trees of them by dotted name.

A parameter also knows the `moments` of its first values, (mean, standard deviation) of a normal distribution, so that
a converter can draw a branch block by block that would not fit into memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.kernels.backends import Implementation
from baichuan_omni_jax.sharding import ShardingRules, parameter_axes, place, placement

# The logical axis that clips, one item of audio each, are split along.
CLIPS = "batch"

Module = TypeVar("Module")


class Buffer(nnx.Variable):
    """Holds an array of the checkpoint that no gradient changes: codebook statistics, biases carried unused."""


@dataclass(frozen=True, kw_only=True)
class ComputePolicy:
    """Says how modules compute: static, part of every module's type.

    Attributes:
        rules: which mesh axes split each logical axis.
        dtype: of activations and of weights while they are computed with; parameters are stored in fp32.
        remat: what a scanned layer keeps for its backward pass (`nn.remat.parse_remat`).
        attention: the attention kernel's implementation; None picks by platform and support.
        attention_block: tokens a block of the attention plan.
        attention_q_block: tokens a block of queries in the language model's; 0: as many.
        attention_kv_block: tokens a block of keys in the language model's; 0: as many.
        mlp_chunk: positions of a row that the MLP works on at once; 0: all.
        int8: whether the language model's layers multiply in int8 (`nn/int8.py`).
    """

    rules: ShardingRules = ShardingRules()
    dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "full"
    attention: Implementation | None = None
    attention_block: int = 512
    attention_q_block: int = 0
    attention_kv_block: int = 0
    mlp_chunk: int = 0
    int8: bool = False

    def spec(self, *names: str | None) -> PartitionSpec | None:
        """Returns how an array of these logical axes is split, for `out_sharding=`; None where no mesh is set."""
        return placement(self.rules.spec(*names))


def normal(key: PRNGKeyArray, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float = 0.02) -> nnx.Param:
    """Returns a trainable parameter drawn from N(0, std^2), fp32; `axes` names each dim of `shape`."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes, moments=(0.0, std))


def zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Returns a trainable parameter of zeros, fp32."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, moments=(0.0, 0.0))


def ones(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Returns a trainable parameter of ones, fp32."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes, moments=(1.0, 0.0))


def use(parameter: nnx.Variable, compute: ComputePolicy, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """Returns the parameter's value, cast to the compute dtype and gathered over `fsdp` and `context`.

    Cast first, so that half the bytes travel. Called inside the layer scan, so that one layer is whole at a time.
    The gradient has the cast value's dtype: what trains in bf16 goes through `gather_weight` of `nn/linear.py` instead.
    """
    return gather(parameter[...].astype(dtype or compute.dtype), parameter_axes(parameter), compute)


def gather(value: Float[Array, "..."], axes: Sequence[str], compute: ComputePolicy) -> Float[Array, "..."]:
    """Returns a parameter's value, or rows of it, whole over `fsdp` and `context`; `axes` are its logical axes."""
    # An all-gather over what parameters are stored split by; on one device nothing happens.
    with jax.named_scope("gather_weight"):
        return place(value, compute.rules.gathered_spec(*axes))


def split_as(x: Array, compute: ComputePolicy, *names: str | None) -> Array:
    """Splits `x` over devices as the logical axes `names` say; dims beyond the names stay whole.

    Free when it already is: the door of a branch, so that a caller may hand in arrays of any placement.
    """
    return place(x, compute.rules.spec(*names, *[None] * (x.ndim - len(names))))


def initialize(make: Callable[..., Module], key: PRNGKeyArray, *sizes: Any) -> Module:
    """Constructs `make(key, *sizes)` in one compiled program: eagerly each of its arrays would be a program of its own.

    >>> from baichuan_omni_jax.nn.layers import RMSNorm
    >>> norm = initialize(lambda key: RMSNorm(4, eps=1e-6, compute=ComputePolicy()), jax.random.key(0))
    >>> norm(jnp.ones((1, 4))).shape
    (1, 4)

    Args:
        make: a module's class, such as `VisionModel`, or a function that constructs it.
        key: the random key of its weights.
        sizes: what the constructor takes beside the key: its configuration and the `ComputePolicy`.

    Returns:
        The module, parameters in fp32: on the mesh in use, or on the default device where none is set.
    """
    # The program runs once, so compiling it is nearly all of the time: on a CPU a third of it without optimizations.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(lambda key: make(key, *sizes), compiler_options=options)(key)


def stack(make: Callable[[PRNGKeyArray], Module], key: PRNGKeyArray, count: int) -> Module:
    """Constructs `count` modules as one, a `layers` axis in front of each parameter, for `jax.lax.scan`."""
    return jax.vmap(make)(jax.random.split(key, count))


def named_variables(module: object) -> dict[str, nnx.Variable]:
    """Returns every variable of a module (or dict of modules) by dotted name: `llm.layers.attention.q_proj`."""
    # Variables are leaves here: their names are paths of attributes, list places and dict keys.
    leaves, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_variable)
    return {dotted(path): leaf for path, leaf in leaves}


def named_values(module: object) -> dict[str, Array | jax.ShapeDtypeStruct]:
    """Returns every variable's value (array or ShapeDtypeStruct) by dotted name."""
    return {name: variable.get_value() for name, variable in named_variables(module).items()}


def with_values(module: Module, values: Mapping[str, object]) -> Module:
    """Returns the module with each variable's value replaced by `values[name]`. Raises KeyError on a missing name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, variable: variable.replace(values[dotted(path)]), module, is_leaf=_is_variable
    )


def dotted(path: tuple) -> str:
    """Writes a key path of `jax.tree_util` as a dotted name, without the variable's own `.value`."""
    names = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


def _is_variable(leaf: object) -> bool:
    """Tells where a module's tree ends for the functions above."""
    return isinstance(leaf, nnx.Variable)
