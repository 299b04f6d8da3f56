"""Convolutions with weight norm, Snake, and the residual block made of them; the STFT and its inverse. Channels last.

Spectra are made with a periodic Hann window, of centered frames, as products with small tables. Each item has its own
length: its signal is mirrored at its own end, and its windows are added up as if it were alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.nn.layers import length_mask, mask_padding, overlap_add, transposed_pieces
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


def hann(n_fft: int) -> Float[np.ndarray, " n"]:
    """Returns the periodic window: 0.5 - 0.5 cos(2 pi n / n_fft)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def stft(
    x: Float[Array, "b s"], lengths: Int32[Array, " b"], *, n_fft: int, hop: int, spec: PartitionSpec | None
) -> Float[Array, "b t c"]:
    """Transforms signals of `lengths` samples to [real, imaginary] (b, s / hop + 1, n_fft + 2), zero past their end.

    `lengths` and s are multiples of `hop`. The signal is mirrored n_fft / 2 samples beyond both its ends (its last
    sample is not repeated): length 4, n_fft 4: samples 2 1 | 0 1 2 3 | 2 1.
    """
    # Mirrored at the item's own ends by index, since each item ends elsewhere.
    samples = x.shape[1]
    place = jnp.abs(jnp.arange(-(n_fft // 2), samples + n_fft // 2))
    last = lengths[:, None] - 1
    place = jnp.clip(jnp.where(place > last, 2 * last - place, place), 0, samples - 1)
    x = jnp.take_along_axis(x, place, 1)
    # A frame is n_fft / hop blocks of `hop` samples, side by side: no gather.
    frames = samples // hop + 1
    blocks = x.reshape(x.shape[0], x.shape[1] // hop, hop, out_sharding=spec)
    frames_of = jnp.concatenate([blocks[:, i : i + frames] for i in range(n_fft // hop)], -1)
    spectrum = jnp.einsum("btn,nc->btc", frames_of.astype(jnp.float32), _forward_table(n_fft), out_sharding=spec)
    return mask_padding(spectrum, jnp.where(lengths > 0, lengths // hop + 1, 0))


def istft(
    real: Float[Array, "b t c"],
    imaginary: Float[Array, "b t c"],
    frames: Int32[Array, " b"],
    *,
    n_fft: int,
    hop: int,
    spec: PartitionSpec | None,
) -> Float[Array, "b s"]:
    """Transforms to signals (b, (t - 1) hop) spectra (b, t, n_fft / 2 + 1) of which `frames` (b,) are valid.

    Windowed frames are added up and divided by the sum of the squared windows, n_fft / 2 samples cut at each end.
    """
    spectrum = jnp.concatenate([real, imaginary], -1).astype(jnp.float32)
    pieces = jnp.einsum("btc,cn->btn", spectrum, _inverse_table(n_fft), out_sharding=spec)
    # Windows past an item's last frame add nothing, neither to the sum nor to what it is divided by.
    valid = length_mask(frames, real.shape[1])[..., None]
    squares = jnp.where(valid, jnp.asarray(hann(n_fft) ** 2, jnp.float32), 0)
    total, weight = (overlap_add(p[..., None], hop, spec)[..., 0] for p in (jnp.where(valid, pieces, 0), squares))
    cut = slice(n_fft // 2, n_fft // 2 + (real.shape[1] - 1) * hop)
    total, weight = total[:, cut], weight[:, cut]
    return jnp.where(weight > 1e-11, total / jnp.where(weight > 1e-11, weight, 1), 0)


def _forward_table(n_fft: int) -> Float[Array, "n c"]:
    """Returns windowed samples -> [cos, -sin] sums, (n_fft, n_fft + 2)."""
    # Computed in fp64 and rounded once; the table is a constant of the program.
    angles = 2 * np.pi * np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1)) / n_fft
    table = np.concatenate([np.cos(angles), -np.sin(angles)], 1)
    return jnp.asarray(hann(n_fft)[:, None] * table, jnp.float32)


def _inverse_table(n_fft: int) -> Float[Array, "c n"]:
    """Returns one-sided [real, imaginary] -> windowed samples; all but the ends stand for two frequencies."""
    angles = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft
    twice = np.where(np.arange(n_fft // 2 + 1) % (n_fft // 2) == 0, 1, 2)[:, None] / n_fft
    table = np.concatenate([twice * np.cos(angles), -twice * np.sin(angles)])
    return jnp.asarray(table * hann(n_fft), jnp.float32)
