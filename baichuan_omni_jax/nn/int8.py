"""Products of int8 numbers for training: of a layer's forward pass and of the gradient toward its input.

A weight has one scale for each of its outputs, a position's activations one for all that is summed over: both come out
of the sum, which then is of whole numbers in int32, exact in any order and so the same on every mesh. What is rounded
goes to the nearest number, but for gradients: there small numbers would always be lost, so that they are rounded up as
often as they are above. The gradient of the weight stays a product of `x` and `dy` as they are, summed in fp32: one
scale for each channel over all the positions of a batch would hold none of them well.

    stored fp32 --max, round--> int8 --gather--> value, scale --.
                                                                 product --> y = (round(x / s) @ value) * s * scale
    x ----------------------------------------------------------'
    backward: dx = dithered(dy * scale / s) @ value^T * s     dW = x^T dy, to the sink (`nn/linear.py`)

Rounding by chance needs a random number for every number: as many as a step has activations, and drawing them would
cost more than int8 saves. Here number (position, channel) has the fraction of `a[position] + c[channel]`. Any two of
them are independent and uniform, which is all that the variance of a sum asks, and few are drawn. `a` is of the whole
row, so that neither its pieces nor its devices change a bit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int8, PRNGKeyArray

from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import parameter_axes, place, placement

# The largest magnitude. -128 is left out: what is symmetric has no bias.
_BOUND = 127.0


class Int8Weight(NamedTuple):
    """Holds a weight to compute with: `value * scale`, a scale for each output; its gradient is summed in `sink`."""

    value: Int8[Array, "..."]
    scale: Float[Array, "..."]
    sink: Float[Array, "..."]


class Dither(NamedTuple):
    """Holds what rounding by chance draws from: `positions` uniform in [0, 1), and a key for the channels."""

    positions: Float[Array, "b t"]
    key: PRNGKeyArray

    @classmethod
    def draw(cls, key: PRNGKeyArray, b: int, t: int, compute: ComputePolicy) -> "Dither":
        """Draws for b rows of t positions, split over devices as these are."""
        of_positions, key = jax.random.split(key)
        return cls(place(jax.random.uniform(of_positions, (b, t)), compute.rules.spec("batch", "length")), key)

    def of(self, number: int) -> "Dither":
        """Returns that of one product of several."""
        return self._replace(key=jax.random.fold_in(self.key, number))


def int8_weight(parameter: nnx.Variable, summed: tuple[int, ...], compute: ComputePolicy) -> Int8Weight:
    """Rounds the parameter to int8 where it is stored, then gathers it: a quarter of its bytes travels.

    The gradient that arrives in the sink goes to the stored parameter as it is, as though nothing had been rounded.

    Args:
        parameter: the stored weight.
        summed: its dims that a product sums over.
        compute: says how a gathered weight is split.
    """
    value, axes = parameter[...], parameter_axes(parameter)
    whole, stored = compute.rules.gathered_spec(*axes), jax.typeof(value)
    kept = compute.rules.gathered_spec(*(axis for i, axis in enumerate(axes) if i not in summed))

    @jax.custom_vjp
    def rounded(value):
        with jax.named_scope("gather_weight"):
            scale = _scale(value, summed)
            small = place(_nearest(value, scale), whole)
            return Int8Weight(small, place(jnp.squeeze(scale, summed), kept), jnp.zeros_like(small, jnp.float32))

    def backward(_: None, cotangent: Int8Weight) -> tuple[Array]:
        return (place(cotangent.sink, stored.sharding.spec).astype(stored.dtype),)

    rounded.defvjp(lambda value: (rounded(value), None), backward)
    return rounded(value)


def int8_product(
    equation: str,
    x: Float[Array, "b t ..."],
    weight: Int8Weight,
    *,
    out: PartitionSpec | None,
    dither: Dither | None = None,
) -> Float[Array, "b t ..."]:
    """Computes `einsum(equation, x, weight)` in int8, with a gradient of the weight in fp32.

    Args:
        equation: "bt...,...->bt...": all of the left operand but its positions is summed over.
        x: the left operand, in the dtype to compute in.
        weight: the right operand, rounded by `int8_weight` for the same sum.
        out: how the result is split over devices; None without a mesh.
        dither: what gradients are rounded with; None: they go to the nearest number.

    Returns:
        The product, in x's dtype.
    """
    operands, result = equation.split("->")
    left, right = operands.split(",")
    out = None if out is None else placement(out)
    of_x, of_weight = jax.typeof(x), jax.typeof(weight.value)

    @jax.custom_vjp
    def multiply(x, weight, dither):
        scale = _scale(x, tuple(range(2, x.ndim)))
        total = _whole_sum(equation, _nearest(x, scale), weight.value, out)
        return (total * _beside(scale, total) * weight.scale).astype(x.dtype)

    def backward(kept, dy):
        x, weight, dither = kept
        # Toward the input: the weight's scales are of channels that are summed over now, so they go into dy first.
        scaled = dy.astype(jnp.float32) * weight.scale
        scale = _scale(scaled, tuple(range(2, dy.ndim)))
        small = _nearest(scaled, scale) if dither is None else _by_chance(scaled, scale, dither)
        total = _whole_sum(f"{result},{right}->{left}", small, weight.value, placement(of_x.sharding.spec))
        dx = (total * _beside(scale, total)).astype(of_x.dtype)
        # Toward the weight: as any other product's (`nn.linear.product`).
        gradient = jnp.einsum(
            f"{left},{result}->{right}",
            x,
            dy,
            out_sharding=placement(of_weight.sharding.spec),
            preferred_element_type=jnp.float32,
        )
        return dx, Int8Weight(None, None, gradient), None  # type: ignore[arg-type]

    multiply.defvjp(lambda *given: (multiply(*given), given), backward)
    return multiply(x, weight, dither)


def _scale(x: Float[Array, "..."], summed: tuple[int, ...]) -> Float[Array, "..."]:
    """What is 1 in int8, fp32, over dims that stay with size 1; 1 where all is 0, and NaN where something is."""
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=summed, keepdims=True) / _BOUND
    return jnp.where(scale == 0, 1.0, scale)


def _nearest(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Int8[Array, "..."]:
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -_BOUND, _BOUND).astype(jnp.int8)


def _by_chance(x: Float[Array, "b t ..."], scale: Float[Array, "b t ..."], dither: Dither) -> Int8[Array, "b t ..."]:
    """Rounds up where the number's chance is below what stands after its point: right on average."""
    spec = jax.typeof(x).sharding.spec
    channels = place(jax.random.uniform(dither.key, x.shape[2:]), PartitionSpec(*spec[2:]))
    chance = (_beside(dither.positions, x) + channels) % 1.0
    return jnp.clip(jnp.floor(x / scale + chance), -_BOUND, _BOUND).astype(jnp.int8)


def _beside(positions: Float[Array, "b t ..."], x: Array) -> Float[Array, "b t ..."]:
    """Numbers of positions, (b, t) and dims of size 1, with as many dims as `x`."""
    positions = jnp.squeeze(positions, tuple(range(2, positions.ndim)))
    return jnp.expand_dims(positions, tuple(range(2, x.ndim)))


def _whole_sum(
    equation: str, x: Int8[Array, "..."], y: Int8[Array, "..."], out: PartitionSpec | None
) -> Float[Array, "..."]:
    """The product of two int8 arrays, summed in int32 and exact, as fp32."""
    return jnp.einsum(equation, x, y, out_sharding=out, preferred_element_type=jnp.int32).astype(jnp.float32)
