"""1-D convolution over the time axis, as one matrix product over windows: channels last, weight (kernel, in, out)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import Compute


class Conv1d(nnx.Module):
    """Windows of `kernel` frames every `stride` frames, `padding` zeros on both sides; the time axis is not split.

    (b, t, in) -> (b, (t + 2 padding - kernel) // stride + 1, out). The checkpoint's weight is (out, in, kernel).
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        rows: str | None,
        compute: Compute,
        bias: bool = True,
        gain: float = 1.0,
    ):
        axes, out = ("kernel", "small", "embed"), (rows, None, None)
        self.linear = Linear(key, "btkc,kcd->btd", shape, axes, out=out, compute=compute, bias=bias, gain=gain)
        self.kernel, self.stride, self.padding = shape[0], stride, padding

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b s d"]:
        x = jnp.pad(x, ((0, 0), (self.padding, self.padding), (0, 0)))
        count = (x.shape[1] - self.kernel) // self.stride + 1
        end = (count - 1) * self.stride + 1
        windows = jnp.stack([x[:, i : i + end : self.stride] for i in range(self.kernel)], 2)
        return self.linear(windows)
