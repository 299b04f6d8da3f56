"""Linear layers and table lookups that compute in a narrow dtype and collect their gradients in fp32.

A weight is stored in fp32 and used as bf16. Differentiated as it stands, `einsum(x, weight)` gives a gradient of the
weight's dtype: every piece of a row adds to a sum in bf16, and so does every device. Each addition rounds to 8 bits, so
what is lost grows with pieces and devices. Here a weight comes with a second array, its *sink*: fp32 zeros that no
forward pass reads. The backward pass of a product gives the sink the gradient, as the fp32 that the matrix unit sums
in. Loops and devices then add fp32 numbers, and what arrives at the stored parameter was never rounded.

    stored fp32 --cast, gather--> value bf16 --.
           ^                                    product --> y
           '---- reshard <------ sink fp32 <---'            (backward: d sink = x^T dy, fp32)

`SpecialRows` are rows of special tokens that train while the tables they belong to are frozen. A language model that
has read text alone knows nothing of `<audiogen_start>` and its like: their rows in the text embedding and the output
head are as they were drawn. Where all else of it stays frozen these few rows can still be learned: they are arrays of
their own, (n, d), with gradients and optimizer state of that size, and stand in for the table's rows wherever those
would be read. The table's rows of these ids are never read, so they are kept at 0.

    ids [57, 58]    tokens  [ 3  57   9 ]    embedding: table[3], rows[0], table[9]
                    logits of 0 .. 56: hidden @ table^T, of 57 and 58: hidden @ rows^T, of 59 ..: hidden @ table^T
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray, Shaped

from baichuan_omni_jax.kernels.backends import platform_of
from baichuan_omni_jax.nn.int8 import Dither, Int8Weight, int8_product, int8_weight
from baichuan_omni_jax.nn.param import ComputePolicy, normal, zeros
from baichuan_omni_jax.sharding import parameter_axes, place, placement


class Gathered(NamedTuple):
    """Holds a weight to compute with: `value` in the compute dtype, `sink` where its gradient is summed."""

    value: Float[Array, "..."]
    sink: Float[Array, "..."]


def gather_weight(parameter: nnx.Variable, compute: ComputePolicy) -> Gathered:
    """Gathers the parameter over `data, fsdp, context`, in the compute dtype. Cast first: half the bytes travel."""
    return gather_rows(parameter[...], parameter_axes(parameter), compute)


def gather_rows(value: Float[Array, "..."], axes: tuple[str, ...], compute: ComputePolicy) -> Gathered:
    """Does as `gather_weight` for a stored array, or rows of it; `axes` are its logical axes."""
    with jax.named_scope("gather_weight"):
        return narrow(value, compute.dtype, compute.rules.gathered_spec(*axes))


def narrow(value: Float[Array, "..."], dtype: DTypeLike, spec: PartitionSpec | None = None) -> Gathered:
    """Casts `value` to `dtype`, placed as `spec` (default: where it is); its gradient comes back placed as it was."""
    stored = jax.typeof(value)
    target = stored.sharding.spec if spec is None else spec

    # Forward: cast, then gather, so that bf16 travels; the sink costs nothing, as no forward pass reads it.
    @jax.custom_vjp
    def narrowed(value):
        small = place(value.astype(dtype), target)
        return Gathered(small, jnp.zeros_like(small, jnp.float32))

    # Backward: what products left in the sink, and what other uses of the value did, summed before it is scattered.
    def backward(_: None, cotangent: Gathered) -> tuple[Array]:
        total = cotangent.sink + cotangent.value.astype(jnp.float32)
        return (place(total, stored.sharding.spec).astype(stored.dtype),)

    narrowed.defvjp(lambda value: (narrowed(value), None), backward)
    return narrowed(value)


def product(
    equation: str,
    x: Float[Array, "..."],
    weight: Gathered,
    *,
    out: PartitionSpec | None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Computes `einsum(equation, x, weight)` with a gradient of the weight in fp32.

    Args:
        equation: every letter of an operand is one of the other operand's or of the result's: "btd,df->btf".
        x: the left operand, in the dtype to compute in.
        weight: the right operand, gathered.
        out: how the result is split over devices; None without a mesh.
        dtype: of the result; None: that of the operands.

    Returns:
        The product, summed in fp32 by the matrix unit.
    """
    out = None if out is None else placement(out)
    operands, result = equation.split("->")
    left, right = operands.split(",")
    # What is differentiated is placed as the operand itself: the einsum then scatters or reduces as it goes.
    of_x, of_weight = jax.typeof(x), placement(jax.typeof(weight.value).sharding.spec)

    @jax.custom_vjp
    def multiply(x, value, sink):
        return jnp.einsum(equation, x, value, out_sharding=out, preferred_element_type=dtype)

    def backward(kept, dy):
        x, value = kept
        # Toward the input in the compute dtype, as the layer before reads it; toward the weight in fp32.
        dx = jnp.einsum(f"{result},{right}->{left}", dy, value, out_sharding=placement(of_x.sharding.spec))
        # The result's type is the sum's: over positions here, and over the devices that have the other positions.
        gradient = jnp.einsum(
            f"{left},{result}->{right}", x, dy, out_sharding=of_weight, preferred_element_type=jnp.float32
        )
        return dx.astype(of_x.dtype), None, gradient

    multiply.defvjp(lambda x, value, sink: (multiply(x, value, sink), (x, value)), backward)
    return multiply(x, *weight)


def look_up(table: Gathered, rows: Int32[Array, "..."], *, out: PartitionSpec | None) -> Float[Array, "... d"]:
    """Returns `table[rows]`, placed as `out`. The gradients of a row's many places are summed in fp32."""

    out = None if out is None else placement(out)

    @jax.custom_vjp
    def take(value, sink, rows):
        return value.at[rows].get(out_sharding=out)

    def backward(kept, dy):
        value, rows = kept
        # The transpose of the lookup in fp32: a scatter-add into zeros.
        zeros = jnp.zeros_like(value, jnp.float32)
        _, scatter = jax.vjp(lambda table: table.at[rows].get(out_sharding=out), zeros)
        return None, *scatter(dy.astype(jnp.float32)), None

    take.defvjp(lambda value, sink, rows: (take(value, sink, rows), (value, rows)), backward)
    return take(*table, rows)


def add_bias(y: Float[Array, "... d"], bias: nnx.Variable, compute: ComputePolicy) -> Float[Array, "... d"]:
    """Adds a bias in y's dtype; the bias is rounded to the compute dtype, its gradient is summed in fp32."""
    small = gather_weight(bias, compute)
    # Only the sink is differentiated: the value's gradient would be a second one of the same bias.
    wide = jax.lax.stop_gradient(small.value).astype(jnp.float32) + small.sink
    return (y.astype(jnp.float32) + wide).astype(y.dtype)


def as_bits(x: Shaped[Array, "*dims"]) -> Shaped[Array, "*dims"]:
    """Returns the same bits as uint16 where `x` is of a 16-bit type and on a CPU, else `x`.

    XLA's CPU casts a whole bf16 table to fp32 to read or write a row of it; moved as bits, the row alone is touched.
    Elsewhere nothing is changed: a TPU would copy the whole table, cast or not.
    """
    tricked = x.dtype.itemsize == 2 and platform_of(x) == "cpu"
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if tricked else x


def from_bits(bits: Shaped[Array, "*dims"], dtype: DTypeLike) -> Shaped[Array, "*dims"]:
    """Returns what `as_bits` was given, an array of `dtype`."""
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


class Linear(nnx.Module):
    """Computes `einsum(equation, x, weight) + bias` in the compute dtype, its result split as `out` says.

    `axes` are the weight's logical axes, `out` the result's. The bias has the weight's dims that the result keeps.
    A random weight gives a result of the input's spread times `gain`. With `int8` it multiplies as `nn/int8.py` does.

    Linear(key, "btd,dnh->btnh", (3584, 28, 128), ("embed", "heads", "head_dim"), out=HEADS, compute=c, bias=True)
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        out: Sequence[str | None],
        compute: ComputePolicy,
        bias: bool = False,
        gain: float = 1.0,
        int8: bool = False,
    ):
        self.equation, self.out, self.compute, self.int8 = equation, tuple(out), compute, int8
        # Letters of the weight that the result lacks are summed over: their sizes decide the spread.
        letters = equation.split(",")[1].split("->")[0]
        fan_in = 1
        for letter, size in zip(letters, shape, strict=True):
            fan_in *= 1 if letter in equation.split("->")[1] else size
        self.weight = normal(key, shape, axes, std=gain * fan_in**-0.5)
        kept = [i for i, letter in enumerate(letters) if letter in equation.split("->")[1]]
        self.bias = zeros(tuple(shape[i] for i in kept), tuple(axes[i] for i in kept)) if bias else None

    def __call__(
        self, x: Float[Array, "..."], weight: Gathered | Int8Weight | None = None, dither: Dither | None = None
    ) -> Float[Array, "..."]:
        """Applies the layer; `weight` is its own, gathered already, for use inside a loop over pieces of a row.

        `dither` is what int8 gradients are rounded with.
        """
        weight = self.gathered() if weight is None else weight
        spec, x = self.compute.spec(*self.out), x.astype(self.compute.dtype)
        if isinstance(weight, Int8Weight):
            y = int8_product(self.equation, x, weight, out=spec, dither=dither)
        else:
            y = product(self.equation, x, weight, out=spec)
        return y if self.bias is None else add_bias(y, self.bias, self.compute)

    def gathered(self) -> Gathered | Int8Weight:
        """Returns the weight as it is computed with."""
        if self.int8:
            _, letters, result = self.equation.replace("->", ",").split(",")
            summed = tuple(i for i, letter in enumerate(letters) if letter not in result)
            return int8_weight(self.weight, summed, self.compute)
        return gather_weight(self.weight, self.compute)


# Logical axes of rows: few, so never split by vocabulary.
ROWS = ("codes", "embed")


@dataclass(frozen=True, eq=False)
class SpecialRows:
    """What stands in for the rows `ids` of the text embedding and of the head (None: the table's own rows count)."""

    ids: tuple[int, ...]
    embedding: Float[Array, "n d"] | None = None
    head: Float[Array, "n d"] | None = None

    def substitute(
        self, x: Float[Array, "b t d"], tokens: Int32[Array, "b t"], compute: ComputePolicy
    ) -> Float[Array, "b t d"]:
        """`x`, the tokens' embeddings, with those of special tokens replaced by their rows."""
        if self.embedding is None:
            return x
        # Both are read for every token and one is selected: no shape depends on how many are special.
        place, special = _find(tokens, self.ids)
        rows = look_up(gather_rows(self.embedding, ROWS, compute), place, out=jax.typeof(x).sharding.spec)
        return jnp.where(special[..., None], rows, x)


@partial(jax.jit, static_argnames="ids")
def take_rows(table: Float[Array, "v d"], ids: tuple[int, ...]) -> tuple[Float[Array, "n d"], Float[Array, "v d"]]:
    """The rows `ids` of a table, and the table with 0 in their place."""
    spec = jax.sharding.PartitionSpec(None, jax.typeof(table).sharding.spec[1])
    rows = table.at[jnp.asarray(ids)].get(out_sharding=spec)
    _, special = _find(_names(table), ids)
    return rows, jnp.where(special[:, None], 0, table)


@partial(jax.jit, static_argnames="ids")
def put_rows(table: Float[Array, "v d"], rows: Float[Array, "n d"], ids: tuple[int, ...]) -> Float[Array, "v d"]:
    """The table, in the rows' dtype, with its rows `ids` replaced: what a checkpoint holds."""
    place, special = _find(_names(table), ids)
    # Selected row by row where the table lies: no write at an index that another device may hold.
    spread = rows.at[place].get(out_sharding=jax.typeof(table).sharding.spec)
    return jnp.where(special[:, None], spread, table.astype(rows.dtype))


def _names(table: Array) -> Int32[Array, "v"]:
    """The id of each row, placed as the rows are."""
    spec = jax.sharding.PartitionSpec(jax.typeof(table).sharding.spec[0])
    return jax.sharding.reshard(jnp.arange(table.shape[0], dtype=jnp.int32), spec)


def _find(names: Int32[Array, "..."], ids: tuple[int, ...]) -> tuple[Int32[Array, "..."], Array]:
    """The place of each name among `ids` (0 where it is none of them), and whether it is one."""
    equal = names[..., None] == jnp.asarray(ids, jnp.int32)
    return jnp.argmax(equal, -1).astype(jnp.int32), equal.any(-1)
