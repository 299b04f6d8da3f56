"""The harmonic source (`f0_predictor.*`, `m_source.*`): pitch from mel, sines and noise from pitch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.nn.lengths import keep
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.vocoder.config import VocoderConfig
from baichuan_omni_jax.vocoder.layers import CLIPS, NormedConv1d

F0_LAYERS, F0_KERNEL = 5, 3
Pair = tuple[Array, Array]


class F0Predictor(nnx.Module):
    """Five convolutions with ELU (`condnet.0, .2, …`), a Linear (`classifier`), absolute value: Hz per mel frame."""

    def __init__(self, key: PRNGKeyArray, cfg: VocoderConfig, compute: ComputePolicy):
        keys = jax.random.split(key, F0_LAYERS + 1)
        widths = (cfg.in_channels, *[cfg.f0_cond_channels] * F0_LAYERS)
        shapes = [(F0_KERNEL, widths[i], widths[i + 1]) for i in range(F0_LAYERS)]
        self.convs = nnx.List([NormedConv1d(keys[i], shape, compute=compute) for i, shape in enumerate(shapes)])
        self.classifier = Linear(
            keys[-1],
            "btc,cd->btd",
            (widths[-1], 1),
            ("small", "small"),
            out=(CLIPS, None, None),
            compute=compute,
            bias=True,
        )

    def __call__(self, mel: Float[Array, "b t mels"], lengths: Int32[Array, " b"]) -> Float[Array, "b t"]:
        """Hz (b, t), fp32, zero past each length."""
        with jax.named_scope("f0"):
            x = keep(mel, lengths)
            for conv in self.convs:
                x = keep(jax.nn.elu(conv(x)), lengths)
            return keep(jnp.abs(self.classifier(x)[..., 0].astype(jnp.float32)), lengths)


class HarmonicSource(nnx.Module):
    """Sines at f0 and its overtones where voiced, noise everywhere, mixed by `l_linear` and tanh."""

    def __init__(self, key: PRNGKeyArray, cfg: VocoderConfig, compute: ComputePolicy):
        out = (CLIPS, None, None)
        self.linear = Linear(
            key, "bsj,jd->bsd", (cfg.harmonics, 1), ("small", "small"), out=out, compute=compute, bias=True
        )
        self.cfg, self.compute = cfg, compute

    def __call__(
        self,
        f0: Float[Array, "b t"],
        phase: Float[Array, "b j"],
        sine_noise: Float[Array, "b s j"],
        before: Pair | None = None,
    ) -> Float[Array, "b s"]:
        """The source, s = t * hop_length samples in (-1, 1), from f0 in Hz.

        `phase` (b, harmonics) is where each sine starts, in radians (uniform in ±pi; the fundamental always starts at
        0); `sine_noise` (b, s, harmonics) is standard normal. `before` (b, harmonics) are the turns made before the
        first sample, where that is not an item's first.
        """
        cfg, hop = self.cfg, self.cfg.hop_length
        with jax.named_scope("harmonic_source"):
            multiples = jnp.arange(1, cfg.harmonics + 1, dtype=jnp.float32)
            turns = accumulated_turns(divided(f0[..., None] * multiples, cfg.sampling_rate), hop, before)
            phase = phase * (jnp.arange(cfg.harmonics) > 0)
            sines = cfg.nsf_alpha * jnp.sin(2 * jnp.pi * turns + phase[:, None])
            voiced = jnp.repeat(f0 > cfg.nsf_voiced_threshold, hop, axis=1)[..., None]
            noise = jnp.where(voiced, cfg.nsf_sigma, cfg.nsf_alpha / 3) * sine_noise
            mixed = self.linear(jnp.where(voiced, sines, 0) + noise)
            return jnp.tanh(mixed[..., 0])


def accumulated_turns(rates: Float[Array, "b t j"], hop: int, before: Pair | None = None) -> Float[Array, "b s j"]:
    """Fraction of a turn after each sample: cumsum(rate of each sample) mod 1, s = t * hop samples.

    `rates` are turns a sample, the same for the `hop` samples of a frame. The sum is carried in pairs of fp32 (48
    bits) and rounded to fp32 before the fraction is taken, as the released sum in double precision is. It begins with
    `before` (b, j), a pair too.
    """
    count = jnp.arange(1, hop + 1, dtype=jnp.float32)[None, None, :, None]
    within = _times(count, rates[:, :, None])
    whole = jnp.full_like(rates, hop), rates
    ends = jax.lax.associative_scan(_add, _times(*whole), axis=1)
    # What had been summed before each frame began.
    begun = tuple(jnp.pad(part[:, :-1], ((0, 0), (1, 0), (0, 0)))[:, :, None] for part in ends)
    if before is not None:
        begun = _add(tuple(part[:, None, None] for part in before), begun)
    total, _ = _add(begun, within)
    b, t, _, j = total.shape
    spec = jax.typeof(total).sharding.spec
    total = total.reshape(b, t * hop, j, out_sharding=jax.sharding.PartitionSpec(spec[0], None, None))
    return total - jnp.floor(total)


def divided(x: Float[Array, "..."], by: int) -> Float[Array, "..."]:
    """x / by, rounded once. XLA multiplies by 1 / by instead: often one bit off, which adds up over the samples."""
    inverse, (by_upper, by_lower) = jnp.float32(1 / by), _halves(jnp.float32(by))
    quotient = x * inverse
    upper, lower = _halves(quotient)
    rest = ((x - upper * by_upper) - upper * by_lower - lower * by_upper) - lower * by_lower
    return quotient + rest * inverse


def _times(count: Array, rate: Array) -> Pair:
    """count * rate, exactly, for whole counts below 4096."""
    upper, lower = _halves(rate)
    return _two_sum(count * upper, count * lower)


def _halves(x: Array) -> Pair:
    """The upper 12 bits of each fp32 and the rest: products of halves are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper


def _add(x: Pair, y: Pair) -> Pair:
    """The sum of two pairs (high, low), whose low part is what the high part's rounding lost."""
    high, low = _two_sum(x[0], y[0])
    return _two_sum(high, low + (x[1] + y[1]))


def _two_sum(a: Array, b: Array) -> Pair:
    """a + b rounded, and exactly what the rounding lost, whichever of the two is larger."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)
