"""The vocoder, HiFT (arXiv:2412.10117): a neural source filter and an inverse STFT. Items are computed as if alone.

    mel --F0Predictor--> pitch --HarmonicSource--> source (24 kHz) --STFT--> spectrum
    mel --conv_pre--> stages of upsampling, each with the spectrum added --conv_post--> magnitude, phase --iSTFT--> wave

Its tensors lie in a file of their own (`f0_predictor.*`, `m_source.l_linear.*`, `conv_pre`, `ups.*`, …).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.nn.layers import mask_padding
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as
from baichuan_omni_jax.sharding import placement
from baichuan_omni_jax.vocoder.layers import (
    NormedConv1d,
    NormedTransposedConv1d,
    ResidualBlock,
    StridedConv1d,
    istft,
    stft,
)

F0_LAYERS, F0_KERNEL = 5, 3
Pair = tuple[Array, Array]


class F0Predictor(nnx.Module):
    """Predicts Hz per mel frame: five convolutions with ELU (`condnet.0, .2, …`), Linear (`classifier`), abs."""

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
        """Returns Hz (b, t), fp32, zero past each length."""
        with jax.named_scope("f0"):
            # Masked after every layer: a bias would make padding a signal for the next convolution.
            x = mask_padding(mel, lengths)
            for conv in self.convs:
                x = mask_padding(jax.nn.elu(conv(x)), lengths)
            return mask_padding(jnp.abs(self.classifier(x)[..., 0].astype(jnp.float32)), lengths)


class HarmonicSource(nnx.Module):
    """Makes the source: sines at f0 and its overtones where voiced, noise everywhere, mixed by `l_linear` and tanh."""

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
        """Makes s = t * hop_length samples in (-1, 1).

        Args:
            f0: pitch in Hz (b, t), one value a mel frame.
            phase: where each sine starts, in radians (b, harmonics), uniform in ±pi; the fundamental always at 0.
            sine_noise: standard normal (b, s, harmonics).
            before: turns (b, harmonics) made before the first sample, where that is not an item's first.

        Returns:
            The source (b, s).
        """
        cfg, hop = self.cfg, self.cfg.hop_length
        with jax.named_scope("harmonic_source"):
            # f0 * j first, then / rate, as released: in the other order fp32 rounds differently, and turns add up.
            multiples = jnp.arange(1, cfg.harmonics + 1, dtype=jnp.float32)
            turns = accumulated_turns(divided(f0[..., None] * multiples, cfg.sampling_rate), hop, before)
            phase = phase * (jnp.arange(cfg.harmonics) > 0)
            sines = cfg.nsf_alpha * jnp.sin(2 * jnp.pi * turns + phase[:, None])
            # Voiced: sines and a little noise. Unvoiced: noise of a third of the sines' amplitude.
            voiced = jnp.repeat(f0 > cfg.nsf_voiced_threshold, hop, axis=1)[..., None]
            noise = jnp.where(voiced, cfg.nsf_sigma, cfg.nsf_alpha / 3) * sine_noise
            mixed = self.linear(jnp.where(voiced, sines, 0) + noise)
            return jnp.tanh(mixed[..., 0])


def accumulated_turns(rates: Float[Array, "b t j"], hop: int, before: Pair | None = None) -> Float[Array, "b s j"]:
    """Returns the fraction of a turn after each sample: cumsum(rate of each sample) mod 1, s = t * hop samples.

    `rates` are turns a sample, the same for the `hop` samples of a frame. The sum is carried in pairs of fp32 (48
    bits) and rounded to fp32 before the fraction is taken, as the released sum in double precision is. It begins with
    `before` (b, j), a pair too.
    """
    # Two levels: within a frame the rate is constant, so its sums are products; over frames an exact prefix sum.
    count = jnp.arange(1, hop + 1, dtype=jnp.float32)[None, None, :, None]
    within = _times(count, rates[:, :, None])
    whole = jnp.full_like(rates, hop), rates
    ends = jax.lax.associative_scan(_add, _times(*whole), axis=1)
    # What had been summed before each frame began.
    high, low = (jnp.pad(part[:, :-1], ((0, 0), (1, 0), (0, 0)))[:, :, None] for part in ends)
    begun = high, low
    if before is not None:
        begun = _add((before[0][:, None, None], before[1][:, None, None]), begun)
    total, _ = _add(begun, within)
    b, t, _, j = total.shape
    spec = jax.typeof(total).sharding.spec
    total = total.reshape(b, t * hop, j, out_sharding=placement(jax.sharding.PartitionSpec(spec[0], None, None)))
    return total - jnp.floor(total)


def divided(x: Float[Array, "..."], by: int) -> Float[Array, "..."]:
    """Returns x / by, rounded once. XLA multiplies by 1 / by: often one bit off, which adds up over the samples."""
    inverse, (by_upper, by_lower) = jnp.float32(1 / by), _halves(jnp.float32(by))
    # One Newton step: the exact remainder x - quotient * by, from products of halves, corrects the last bit.
    quotient = x * inverse
    upper, lower = _halves(quotient)
    rest = ((x - upper * by_upper) - upper * by_lower - lower * by_upper) - lower * by_lower
    return quotient + rest * inverse


def _times(count: Array, rate: Array) -> Pair:
    """Returns count * rate, exactly, for whole counts below 4096."""
    upper, lower = _halves(rate)
    return _two_sum(count * upper, count * lower)


def _halves(x: Array) -> Pair:
    """Returns the upper 12 bits of each fp32 and the rest: products of halves are exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper


def _add(x: Pair, y: Pair) -> Pair:
    """Returns the sum of two pairs (high, low), whose low part is what the high part's rounding lost."""
    high, low = _two_sum(x[0], y[0])
    return _two_sum(high, low + (x[1] + y[1]))


def _two_sum(a: Array, b: Array) -> Pair:
    """Returns a + b rounded, and exactly what the rounding lost, whichever of the two is larger (Knuth's two-sum)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


END_KERNEL = 7
# The released code writes the last activation without its configured slope: PyTorch's default.
LAST_SLOPE = 0.01
MAX_MAGNITUDE = 100.0


class Vocoder(nnx.Module):
    """F0 -> harmonic source -> body: the mel is upsampled, the source's spectrum added at every stage -> inverse STFT.

    Names are the checkpoint's: `conv_pre, ups.i, source_downs.i, source_resblocks.i, resblocks.n, conv_post`;
    `m_source.l_linear` is `source.linear`.
    """

    def __init__(self, key: PRNGKeyArray, cfg: VocoderConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 8)
        stages = range(len(cfg.upsample_rates))
        self.f0_predictor = F0Predictor(keys[0], cfg, compute)
        self.source = HarmonicSource(keys[1], cfg, compute)
        self.conv_pre = NormedConv1d(keys[2], (END_KERNEL, cfg.in_channels, cfg.base_channels), compute=compute)
        stage_keys = [jax.random.split(keys[i], len(stages)) for i in (3, 4, 5, 6)]
        self.ups = nnx.List([self._up(stage_keys[0][i], cfg, i, compute) for i in stages])
        width_in = 2 * cfg.spectrum
        self.source_downs = nnx.List(
            [
                StridedConv1d(
                    stage_keys[1][i], width_in, cfg.channels(i), stride=cfg.source_strides[i], compute=compute
                )
                for i in stages
            ]
        )
        sizes = list(zip(cfg.source_resblock_kernel_sizes, cfg.source_resblock_dilation_sizes, strict=True))
        self.source_resblocks = nnx.List(
            [ResidualBlock(stage_keys[2][i], k, cfg.channels(i), d, compute) for i, (k, d) in enumerate(sizes)]
        )
        self.resblocks = nnx.List(
            [block for i in stages for block in self._resblocks(stage_keys[3][i], cfg, cfg.channels(i), compute)]
        )
        last = (END_KERNEL, cfg.channels(stages[-1]), 2 * cfg.spectrum)
        self.conv_post = NormedConv1d(keys[7], last, compute=compute)
        self.cfg, self.compute = cfg, compute

    @staticmethod
    def _up(key: PRNGKeyArray, cfg: VocoderConfig, i: int, compute: ComputePolicy) -> NormedTransposedConv1d:
        shape = (cfg.upsample_kernel_sizes[i], cfg.channels(i - 1), cfg.channels(i))
        return NormedTransposedConv1d(key, shape, stride=cfg.upsample_rates[i], compute=compute)

    @staticmethod
    def _resblocks(key: PRNGKeyArray, cfg: VocoderConfig, width: int, compute: ComputePolicy) -> list[ResidualBlock]:
        sizes = list(zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes, strict=True))
        keys = jax.random.split(key, len(sizes))
        return [ResidualBlock(keys[n], k, width, d, compute) for n, (k, d) in enumerate(sizes)]

    def __call__(
        self,
        mel: Float[Array, "b t mels"],
        lengths: Int32[Array, " b"],
        phase: Float[Array, "b j"],
        sine_noise: Float[Array, "b s j"],
    ) -> Float[Array, "b s"]:
        """Makes waveforms.

        Args:
            mel: natural log magnitudes (b, t, mels).
            lengths: its valid frames (b,).
            phase: uniform in ±pi (b, harmonics); with `sine_noise` the randomness (see `draw_noise`).
            sine_noise: standard normal (b, t * hop_length, harmonics).

        Returns:
            (b, t * hop_length), fp32 in ±audio_limit, zero past each length * hop_length.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(mel, lengths, phase, sine_noise)
        arrays = (split_as(x, self.compute, CLIPS) for x in (mel, lengths, phase, sine_noise))
        mel, lengths, phase, sine_noise = arrays
        with jax.named_scope("vocoder"):
            source = self.source(self.f0_predictor(mel, lengths), phase, sine_noise)
            return self.filter(mel, lengths, source)

    def filter(
        self, mel: Float[Array, "b t mels"], lengths: Int32[Array, " b"], source: Float[Array, "b s"]
    ) -> Float[Array, "b s"]:
        """Returns the waveform of a mel and a source signal."""
        cfg = self.cfg
        spec = self.compute.spec(CLIPS, None, None)
        sizes = {"n_fft": cfg.istft_n_fft, "hop": cfg.istft_hop, "spec": spec}
        samples = lengths * cfg.hop_length
        # The source enters by its spectrum; the body computes in the compute dtype, transforms in fp32.
        spectrum = stft(source, samples, **sizes).astype(self.compute.dtype)
        x, frames = self.body(mel, lengths, spectrum)
        with jax.named_scope("inverse_stft"):
            x = x.astype(jnp.float32)
            # Capped, as released: exp turns one outlier into a click.
            magnitude = jnp.minimum(jnp.exp(x[..., : cfg.spectrum]), MAX_MAGNITUDE)
            # The released model bends the phase through a sine before it is used as an angle.
            angle = jnp.sin(x[..., cfg.spectrum :])
            wave = istft(magnitude * jnp.cos(angle), magnitude * jnp.sin(angle), frames, **sizes)
            return jnp.clip(mask_padding(wave, samples), -cfg.audio_limit, cfg.audio_limit)

    def body(
        self, mel: Float[Array, "b t mels"], lengths: Int32[Array, " b"], spectrum: Float[Array, "b f c"]
    ) -> tuple[Float[Array, "b f c"], Int32[Array, " b"]]:
        """Returns log magnitudes and angles (b, f, n_fft + 2), f = t * hop_length / istft_hop + 1, and valid counts."""
        cfg = self.cfg
        x = mask_padding(self.conv_pre(mask_padding(mel, lengths)), lengths)
        per_stage = len(cfg.resblock_kernel_sizes)
        for i, rate in enumerate(cfg.upsample_rates):
            with jax.named_scope(f"stage_{i}"):
                x, lengths = self.ups[i](jax.nn.leaky_relu(x, cfg.lrelu_slope)), lengths * rate
                if i == len(cfg.upsample_rates) - 1:
                    # One frame, reflected, on the left: as many frames then as the source's centered spectrum has.
                    x = jnp.concatenate([x[:, 1:2], x], 1)
                    lengths = jnp.where(lengths > 0, lengths + 1, 0)
                # The source's spectrum at this stage's rate, then the mean of residual blocks of several kernels.
                source = mask_padding(self.source_downs[i](spectrum), lengths)
                x = mask_padding(x, lengths) + self.source_resblocks[i](source, lengths)
                blocks = self.resblocks[i * per_stage : (i + 1) * per_stage]
                x = sum(block(x, lengths) for block in blocks) / per_stage
        return self.conv_post(jax.nn.leaky_relu(x, LAST_SLOPE)), lengths

    def _check(self, mel: Array, lengths: Array, phase: Array, sine_noise: Array) -> None:
        b, t, mels = mel.shape
        if mels != self.cfg.in_channels or lengths.shape != (b,):
            raise ValueError(
                f"mel {mel.shape} and lengths {lengths.shape}: expected (items, frames, {self.cfg.in_channels}) "
                "and (items,)"
            )
        noise = (b, t * self.cfg.hop_length, self.cfg.harmonics)
        if phase.shape != (b, self.cfg.harmonics) or sine_noise.shape != noise:
            raise ValueError(
                f"phase {phase.shape} and sine_noise {sine_noise.shape}: expected {(b, self.cfg.harmonics)} and {noise}"
            )


def draw_noise(
    key: PRNGKeyArray, frames: Int32[Array, " t"], cfg: VocoderConfig
) -> tuple[Float[Array, "1 j"], Float[Array, "1 s j"]]:
    """Draws `phase` and `sine_noise` of one item's mel frames `frames`. A frame's are its own, whatever the rest."""
    for_phase, for_noise = jax.random.split(key)
    phase = jax.random.uniform(for_phase, (1, cfg.harmonics), minval=-jnp.pi, maxval=jnp.pi)
    shape = cfg.hop_length, cfg.harmonics
    noise = jax.vmap(lambda frame: jax.random.normal(jax.random.fold_in(for_noise, frame), shape))(frames)
    return phase, noise.reshape(1, -1, cfg.harmonics)


def reach(cfg: VocoderConfig) -> int:
    """Returns how many mel frames on either side may change a sample, but for the phase: 21 at released sizes."""
    overlap, frame = cfg.istft_n_fft // cfg.istft_hop, math.prod(cfg.upsample_rates)
    # All in frames of the inverse STFT, from the waveform back; one more for the frame put on the left.
    through, by_source = overlap + END_KERNEL // 2 + 1, 0
    for i in reversed(range(len(cfg.upsample_rates))):
        step, rate = cfg.source_strides[i], cfg.upsample_rates[i]
        blocks = zip(cfg.resblock_kernel_sizes, cfg.resblock_dilation_sizes, strict=True)
        through += step * max(_block_reach(*sizes) for sizes in blocks)
        own = _block_reach(cfg.source_resblock_kernel_sizes[i], cfg.source_resblock_dilation_sizes[i])
        by_source = max(by_source, through + step * (own + 2) + overlap)
        through += step * rate * -(-(cfg.upsample_kernel_sizes[i] - rate) // (2 * rate))
    through += frame * (END_KERNEL // 2)
    by_source += frame * (1 + F0_LAYERS * (F0_KERNEL // 2))
    return -(-max(through, by_source) // frame)


def _block_reach(kernel: int, dilations: tuple[int, ...]) -> int:
    """Returns frames on either side that a residual block reads: a dilated and a plain convolution each time."""
    return sum(kernel // 2 * (dilation + 1) for dilation in dilations)
