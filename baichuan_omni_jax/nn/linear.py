"""A weight and its einsum."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.nn.param import ComputePolicy, normal, zeros
from baichuan_omni_jax.nn.products import Gathered, add_bias, gather_weight, product


class Linear(nnx.Module):
    """`einsum(equation, x, weight) + bias`, in the compute dtype, its result split as `out` says.

    `axes` are the weight's logical axes, `out` the result's. The bias has the weight's dims that the result keeps.
    A random weight gives a result of the input's spread times `gain`.

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
    ):
        self.equation, self.out, self.compute = equation, tuple(out), compute
        letters = equation.split(",")[1].split("->")[0]
        fan_in = 1
        for letter, size in zip(letters, shape, strict=True):
            fan_in *= 1 if letter in equation.split("->")[1] else size
        self.weight = normal(key, shape, axes, std=gain * fan_in**-0.5)
        kept = [i for i, letter in enumerate(letters) if letter in equation.split("->")[1]]
        self.bias = zeros(tuple(shape[i] for i in kept), tuple(axes[i] for i in kept)) if bias else None

    def __call__(self, x: Float[Array, "..."], weight: Gathered | None = None) -> Float[Array, "..."]:
        """`weight` is the own one, gathered already: for use inside a loop over pieces of a row."""
        weight = self.gathered() if weight is None else weight
        spec = self.compute.rules.spec(*self.out)
        y = product(self.equation, x.astype(self.compute.dtype), weight, out=spec)
        return y if self.bias is None else add_bias(y, self.bias, self.compute)

    def gathered(self) -> Gathered:
        """The weight as it is computed with."""
        return gather_weight(self.weight, self.compute)
