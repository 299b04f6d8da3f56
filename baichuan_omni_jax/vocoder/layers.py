"""Convolutions with weight norm, Snake, and the residual block made of them. Channels last."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.nn.conv import mask_padding, overlap_add, transposed_pieces
from baichuan_omni_jax.nn.linear import narrow
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, normal, ones, use, zeros

# 13 M parameters in layers as narrow as 4 channels: whole on every device.
WHOLE = ("small", "small", "small")
SNAKE_EPS = 1e-9


def convolve(
    x: Float[Array, "b t c"], weight: Float[Array, "k c d"], *, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Float[Array, "b s d"]:
    """Convolves (b, t, in) to (b, (t + 2 padding - dilation (k - 1) - 1) // stride + 1, out).

    The backend's own convolution: windows of 11 frames at 24 kHz / 4 would take eleven times the room.
    """
    return jax.lax.conv_general_dilated(
        x, weight, (stride,), [(padding, padding)], rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )


class NormedConv1d(nnx.Module):
    """Convolves and keeps the length; weight = g * v / |v|, the norm over all of an output channel's entries.

    `weight_v` (kernel, in, out) and `weight_g` (out,) are the checkpoint's (out, in, kernel) and (out, 1, 1).
    """

    def __init__(self, key: PRNGKeyArray, shape: tuple[int, int, int], *, dilation: int = 1, compute: ComputePolicy):
        kernel, width_in, width = shape
        self.weight_v = normal(key, shape, WHOLE, std=(kernel * width_in) ** -0.5)
        self.weight_g = ones((width,), ("small",))
        self.bias = zeros((width,), ("small",))
        self.padding, self.dilation, self.compute = (kernel - 1) // 2 * dilation, dilation, compute

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t d"]:
        # Normalized in each call: parameters stay those of the checkpoint, and train as such.
        weight = normed(self.weight_v, self.weight_g, self.compute, over=(0, 1))
        y = convolve(x.astype(weight.dtype), weight, padding=self.padding, dilation=self.dilation)
        return y + use(self.bias, self.compute)


class NormedTransposedConv1d(nnx.Module):
    """Lengthens (b, t, in) to (b, t * stride, out): a transposed convolution, (kernel - stride) / 2 frames cut a side.

    `weight_v` (kernel, in, out) is the checkpoint's (in, out, kernel), `weight_g` (in,) its (in, 1, 1): PyTorch
    normalizes over all axes but the first, which is a transposed convolution's input.
    """

    def __init__(self, key: PRNGKeyArray, shape: tuple[int, int, int], *, stride: int, compute: ComputePolicy):
        kernel, width_in, width = shape
        self.weight_v = normal(key, shape, WHOLE, std=(kernel * width_in / stride) ** -0.5)
        self.weight_g = ones((width_in,), ("small",))
        self.bias = zeros((width,), ("small",))
        self.stride, self.cut, self.compute = stride, (kernel - stride) // 2, compute

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b s d"]:
        # Pieces of `kernel` frames a frame, added up where they overlap, then the middle part.
        weight = normed(self.weight_v, self.weight_g, self.compute, over=(0, 2), scaled=1)
        pieces = transposed_pieces(x, narrow(weight, weight.dtype), CLIPS, self.compute)
        y = overlap_add(pieces, self.stride, self.compute.spec(CLIPS, None, None))
        return y[:, self.cut : self.cut + x.shape[1] * self.stride] + use(self.bias, self.compute)


class StridedConv1d(nnx.Module):
    """Convolves by `weight` (kernel, in, out), no weight norm: brings the source's spectrum to a stage's rate.

    A stride u > 1 has kernel 2u and padding u // 2; stride 1 is a 1x1 convolution.
    """

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, *, stride: int, compute: ComputePolicy):
        kernel = 2 * stride if stride > 1 else 1
        self.weight = normal(key, (kernel, width_in, width), WHOLE, std=(kernel * width_in) ** -0.5)
        self.bias = zeros((width,), ("small",))
        self.stride, self.padding, self.compute = stride, stride // 2, compute

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b s d"]:
        weight = use(self.weight, self.compute)
        y = convolve(x.astype(weight.dtype), weight, stride=self.stride, padding=self.padding)
        return y + use(self.bias, self.compute)


class Snake(nnx.Module):
    """Computes x + sin²(alpha x) / (alpha + 1e-9), one alpha a channel (arXiv:2006.08195); zero stays zero."""

    def __init__(self, width: int, compute: ComputePolicy):
        self.alpha = ones((width,), ("small",))
        self.compute = compute

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        alpha = use(self.alpha, self.compute)
        return x + jnp.sin(alpha * x) ** 2 / (alpha + SNAKE_EPS)


class ResidualBlock(nnx.Module):
    """Computes per dilation: Snake -> dilated convolution -> Snake -> convolution, added to what came in."""

    def __init__(self, key: PRNGKeyArray, kernel: int, width: int, dilations: tuple[int, ...], compute: ComputePolicy):
        keys = jax.random.split(key, 2 * len(dilations))
        shape = (kernel, width, width)
        convs = [NormedConv1d(keys[2 * i], shape, dilation=d, compute=compute) for i, d in enumerate(dilations)]
        self.convs1 = nnx.List(convs)
        self.convs2 = nnx.List([NormedConv1d(keys[2 * i + 1], shape, compute=compute) for i in range(len(dilations))])
        self.activations1 = nnx.List([Snake(width, compute) for _ in dilations])
        self.activations2 = nnx.List([Snake(width, compute) for _ in dilations])

    def __call__(self, x: Float[Array, "b t c"], lengths: Int32[Array, " b"]) -> Float[Array, "b t c"]:
        """Returns the sum; `x` and it are zero past the lengths: each convolution sees an item as if it were alone."""
        units = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in units:
            # Masked after every convolution: its reach would else carry padding into the item.
            y = mask_padding(conv1(snake1(x)), lengths)
            x = x + mask_padding(conv2(snake2(y)), lengths)
        return x


def normed(
    v: nnx.Param, g: nnx.Param, compute: ComputePolicy, *, over: tuple[int, int], scaled: int = 2
) -> Float[Array, "k c d"]:
    """Returns g * v / |v|, in fp32, then cast: the norm over the axes `over`, g along the axis `scaled`."""
    direction, gain = use(v, compute, jnp.float32), use(g, compute, jnp.float32)
    # fp32, as the norm is over few values and decides the scale of a whole channel.
    size = jnp.sqrt(jnp.sum(direction * direction, over, keepdims=True))
    gain = jnp.expand_dims(gain, tuple(axis for axis in range(3) if axis != scaled))
    return (direction * (gain / size)).astype(compute.dtype)
