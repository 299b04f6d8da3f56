"""The language model's weights as decoding reads them: each once for every token, so their layout decides the speed.

One table says which training weights each decode weight is made of; `tests/llm/test_decode.py` proves them equal
(`test_the_decode_layout_holds_the_training_weights`) and what both compute (`test_logits_of_unequal_rows_...`).

Differences to training: layers are apart, since a scan over stacked weights copies each before use on a CPU; every
matrix has two dims, the contracted one last, since XLA's CPU product copies any other first (a TPU's takes either);
Q, K and V are one matrix; weights are cast to the compute dtype and whole over `data`, `fsdp` and `context`, so that
nothing but activations travels between devices.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.architecture import LLMConfig
from baichuan_omni_jax.kernels.backends import platform_of
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, normal, use, zeros


class MatrixLinear(nnx.Module):
    """A linear map whose weight is a matrix (out, in); the result is split as `out` says. Not for training.

    Weight and bias lie as they are computed with, in the compute dtype and whole over all axes but `tensor`: they are
    read as they are, since even a cast or a placement that changes nothing would stand in every step's program.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int],
        axes: tuple[str, str],
        *,
        out: Sequence[str | None],
        compute: ComputePolicy,
        bias: bool = False,
    ):
        self.weight = normal(key, shape, axes)
        self.bias = zeros(shape[:1], axes[:1]) if bias else None
        self.out, self.compute = tuple(out), compute

    def __call__(self, x: Float[Array, "b t i"], weight: Float[Array, "o i"] | None = None) -> Float[Array, "b t o"]:
        """`weight` is the own one, as `gathered` gave it."""
        weight = self.gathered() if weight is None else weight
        y = project(x.astype(self.compute.dtype), weight, self.compute.spec(*self.out))
        return y if self.bias is None else y + self.bias[...]

    def gathered(self) -> Float[Array, "o i"]:
        """Returns the weight as it is computed with."""
        return self.weight[...]


def project(
    x: Float[Array, "... i"], weight: Float[Array, "o i"], spec: PartitionSpec | None, dtype: DTypeLike | None = None
) -> Float[Array, "... o"]:
    """Multiplies every row of `x` by a matrix.

    Args:
        x: rows to multiply.
        weight: the matrix, its contracted dim last.
        spec: how the result is split.
        dtype: of the result (default: that of `x`); sums are fp32.
    """
    dtype = x.dtype if dtype is None else dtype
    # A single row on one CPU device, the usual step there: its product in bf16 is done by hand.
    alone = x.size == x.shape[-1] and jax.typeof(x).sharding.mesh.size == 1
    if alone and weight.dtype == jnp.bfloat16 and platform_of(x) == "cpu":
        return jax.shard_map(_sum_of_products, out_specs=spec, check_vma=False)(x, weight).astype(dtype)
    # Everywhere else the backend's product: summed in fp32, rounded once to the dtype asked for.
    contracted = ((x.ndim - 1,), (1,))
    out = jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=jnp.float32, out_sharding=spec)
    return out.astype(dtype)


def _sum_of_products(x: Float[Array, "... i"], weight: Float[Array, "o i"]) -> Float[Array, "... o"]:
    """A matrix times one row: ten times as fast as XLA's CPU product in bf16, which casts the whole matrix first."""
    # Bound to the row, or the cast would be taken out of a loop over tokens, and all weights held in fp32.
    x, weight = jax.lax.optimization_barrier((x, weight))
    wide = weight.astype(jnp.float32) * x.reshape(-1).astype(jnp.float32)
    return wide.sum(-1).reshape(*x.shape[:-1], -1)


def split_heads(
    qkv: Float[Array, "b t _"], cfg: LLMConfig, compute: ComputePolicy
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Queries, keys and values of the joined projection, which `_join_heads` orders by key head.

    A key head with its query heads lies together, so that `tensor` splits the joined matrix where it splits heads.
    """
    # Undoes `_join_heads`: of each group the last two are key and value, the others are queries.
    b, t, _ = qkv.shape
    spec, k, h = compute.spec, cfg.num_kv_heads, cfg.head_dim
    groups = jnp.reshape(qkv, (b, t, k, -1, h), out_sharding=spec("batch", "length", "act_kv_heads", None, None))
    q = jnp.reshape(groups[:, :, :, :-2], (b, t, -1, h), out_sharding=spec("batch", "length", "act_heads", None))
    return q, groups[:, :, :, -2], groups[:, :, :, -1]


def _join_heads(parts: Sequence[Array], cfg: LLMConfig, compute: ComputePolicy) -> Array:
    """Weights (d, heads, h) -> (k (g + 2) h, d), or biases (heads, h) -> (k (g + 2) h): per key head its g query heads'
    projections, its key's and its value's."""
    spec, k = compute.rules.gathered_spec, cfg.num_kv_heads
    # By key head first, (k, heads of the group, h[, d]), then flat.
    groups = []
    for part in parts:
        part = jnp.moveaxis(part, 0, -1) if part.ndim == 3 else part  # heads, head_dim[, embed]
        shape = (k, -1, *part.shape[1:])
        groups.append(jnp.reshape(part, shape, out_sharding=spec("kv_heads", *[None] * (len(shape) - 1))))
    joined, rest = jnp.concatenate(groups, 1), parts[0].shape[:-2]
    return jnp.reshape(joined, (-1, *rest), out_sharding=spec("kv_heads", *[None] * len(rest)))


def _heads_last(parts: Sequence[Array], cfg: LLMConfig, compute: ComputePolicy) -> Array:
    """(n, h, d) -> (d, n h)."""
    spec = compute.rules.gathered_spec("heads", None)
    return jnp.reshape(parts[0], (-1, cfg.hidden_size), out_sharding=spec).T


def _transposed(parts: Sequence[Array], cfg: LLMConfig, compute: ComputePolicy) -> Array:
    return parts[0].T


Change = Callable[[Sequence[Array], LLMConfig, ComputePolicy], Array]

# Decode weight of a layer <- the training weights it is made of, and how. Norm scales are the same in both.
DECODE_LAYOUT: Mapping[str, tuple[tuple[str, ...], Change]] = {
    "attention.qkv_proj.weight": (tuple(f"attention.{x}_proj.weight" for x in "qkv"), _join_heads),
    "attention.qkv_proj.bias": (tuple(f"attention.{x}_proj.bias" for x in "qkv"), _join_heads),
    "attention.o_proj.weight": (("attention.o_proj.weight",), _heads_last),
    "mlp.gate_proj.weight": (("mlp.gate_proj.weight",), _transposed),
    "mlp.up_proj.weight": (("mlp.up_proj.weight",), _transposed),
    "mlp.down_proj.weight": (("mlp.down_proj.weight",), _transposed),
}


@partial(jax.jit, static_argnames=("cfg", "compute"))
def decode_layer_values(
    layers: nnx.Module, index: Int32[Array, ""], cfg: LLMConfig, compute: ComputePolicy
) -> dict[str, Array]:
    """Makes the weights of one layer in the layout of decoding.

    Args:
        layers: the stacked `DecoderLayer`s of a language model in the training layout.
        index: which of them.
        cfg: the language model's sizes.
        compute: its dtype is that of the weights.

    Returns:
        Arrays by their name in a `DecoderLayer` of the decode layout.
    """
    # One program for all layers: which one is an argument.
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), layers)
    stored = named_variables(layer)
    made = {name: stored[name][...] for name in ("attention_norm.scale", "mlp_norm.scale")}
    for name, (sources, change) in DECODE_LAYOUT.items():
        # Cast and gathered first: what is rearranged is then half as big, and split over `tensor` alone.
        made[name] = change([use(stored[source], compute) for source in sources], cfg, compute)
    return made


def whole(variable: nnx.Variable, compute: ComputePolicy) -> Array:
    """As `use`, but the very same buffer where it already is so."""
    return jax.device_put(variable[...].astype(compute.dtype), compute.rules.gathered_spec(*variable.axes))
