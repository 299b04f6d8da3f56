"""The branch `audio_decoder` (`audio_tokenizer.audio_decoder.*`): codes at 12.5 Hz back to states and mel.

    codes (12.5 Hz) --dconv1--> causal layers --> hidden (50 Hz) --dconv2--> coarse mel --post-net--> refined mel

An item's result never depends on its batch: normalizations count its own frames, and the coarse mel is resized by its
own lengths. The released code counts the padding of the batch, which `padded=True` repeats.
"""

import math
from itertools import pairwise
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.encoder import sinusoids
from baichuan_omni_jax.config.architecture import AudioConfig, PostNetConfig
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, run_encoder
from baichuan_omni_jax.nn.layers import (
    Conv1d,
    GroupNorm,
    LayerNorm,
    TransposedConv1d,
    length_mask,
    mask_padding,
    resize_nearest,
)
from baichuan_omni_jax.nn.linear import Linear
from baichuan_omni_jax.nn.param import CLIPS, ComputePolicy, split_as, stack

Frames = TypeVar("Frames", int, Array)

KERNEL = 5
# The post-net is small: whole on every device.
WHOLE = ("small", "small")


class PostNetBlock(nnx.Module):
    """Computes convolution -> GroupNorm -> Mish (`layers.3i`, `layers.3i+1` of the checkpoint)."""

    def __init__(self, key: PRNGKeyArray, width_in: int, width: int, eps: float, compute: ComputePolicy):
        shape = (KERNEL, width_in, width)
        self.conv = Conv1d(key, shape, padding=KERNEL // 2, rows=CLIPS, compute=compute, channels=WHOLE)
        self.norm = GroupNorm(width, eps=eps, compute=compute)

    def __call__(self, x: Float[Array, "m t c"], real: Bool[Array, "m t"]) -> Float[Array, "m t d"]:
        return jax.nn.mish(self.norm(self.conv(x), real))


class PostNet(nnx.Module):
    """Returns what to add to a coarse mel (`audio_decoder.post_net`).

    Blocks of widths `channels[:-1]`, then a 1x1 convolution (the last of `layers`).
    """

    def __init__(self, key: PRNGKeyArray, cfg: PostNetConfig, eps: float, compute: ComputePolicy):
        widths = (cfg.num_mel_bins, *cfg.channels[:-1])
        keys = jax.random.split(key, len(widths))
        self.blocks = nnx.List([PostNetBlock(keys[i], *pair, eps, compute) for i, pair in enumerate(pairwise(widths))])
        out = (1, widths[-1], cfg.num_mel_bins)
        self.out = Conv1d(keys[-1], out, rows=CLIPS, compute=compute, channels=WHOLE)

    def __call__(self, mel: Float[Array, "m t mels"], real: Bool[Array, "m t"]) -> Float[Array, "m t mels"]:
        """Returns the correction. Statistics count and convolutions see `real` frames alone; it is not masked."""
        with jax.named_scope("post_net"):
            x = mel
            for block in self.blocks:
                x = block(jnp.where(real[..., None], x, 0), real)
            return self.out(x)


class DecodedAudio(NamedTuple):
    """Holds what the decoder makes of m items; everything is zero past an item's length.

    `hidden` (m, t, d_model): 50 Hz states that flow matching reads (before `dconv2`), `hidden_lengths` (m,) of them;
    `coarse_mel`, `refined_mel` (m, s, mels) at the post-net's rate (62.5 Hz), `mel_lengths` (m,) of both.
    """

    hidden: Float[Array, "m t d"]
    hidden_lengths: Int32[Array, " m"]
    coarse_mel: Float[Array, "m s mels"]
    refined_mel: Float[Array, "m s mels"]
    mel_lengths: Int32[Array, " m"]


class UpsampleBlock(nnx.Module):
    """Lengthens items: transposed convolution -> GroupNorm over all it made -> max(0, kernel - stride) last frames cut.

    L frames become (L - 1) stride + kernel - max(0, kernel - stride): kernel 3, stride 4 give 4 L - 1; stride 2: 2 L.
    """

    def __init__(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, int, int],
        *,
        stride: int,
        eps: float,
        compute: ComputePolicy,
        channels: tuple[str, str] = ("small", "embed"),
    ):
        self.conv = TransposedConv1d(key, shape, stride=stride, rows=CLIPS, compute=compute, channels=channels)
        self.norm = GroupNorm(shape[2], eps=eps, compute=compute)
        self.kernel, self.stride, self.cut = shape[0], stride, max(0, shape[0] - stride)

    def __call__(
        self, x: Float[Array, "m t c"], lengths: Int32[Array, " m"], *, padded: bool
    ) -> tuple[Float[Array, "m s d"], Int32[Array, " m"]]:
        """Returns the longer items, zero past their new lengths, and these. `x` is zero past `lengths`."""
        y = self.conv(x)
        # Parity quirk: statistics count the frames that are cut afterwards too.
        made = jnp.where(lengths > 0, (lengths - 1) * self.stride + self.kernel, 0)
        counted = length_mask(jnp.full_like(made, y.shape[1]) if padded else made, y.shape[1])
        y = self.norm(y, counted)[:, : y.shape[1] - self.cut]
        lengths = jnp.maximum(made - self.cut, 0)
        return mask_padding(y, lengths), lengths


class AudioDecoder(nnx.Module):
    """Decodes sums of codes: `proj_decoder` -> `dconv1` -> causal Whisper layers -> `dconv2` -> resize -> post-net.

    `proj_decoder` lies under `audio_tokenizer.audio_bridge_model` in the checkpoint, all else under `audio_decoder`.
    """

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, post_net: PostNetConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 5)
        d, k, eps = cfg.d_model, cfg.decoder_kernel_size, cfg.norm_eps
        self.sizes = EncoderSizes(
            width=d,
            heads=cfg.decoder_attention_heads,
            ffn=cfg.decoder_ffn_dim,
            eps=eps,
            rows=(CLIPS, None),
            key_bias=False,
            causal=True,
        )
        out = (CLIPS, None, None)
        self.proj_decoder = Linear(
            keys[0], "mgc,cd->mgd", (cfg.code_dim, d), ("small", "embed"), out=out, compute=compute, bias=True
        )
        self.dconv1 = UpsampleBlock(keys[1], (k, d, d), stride=cfg.avg_pooler, eps=eps, compute=compute)
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[2], cfg.decoder_layers)
        self.norm = LayerNorm(d, eps=eps, compute=compute)
        self.dconv2 = UpsampleBlock(
            keys[3],
            (k, d, post_net.num_mel_bins),
            stride=cfg.decoder_stride_size,
            eps=eps,
            compute=compute,
            channels=("embed", "small"),
        )
        self.post_net = PostNet(keys[4], post_net, eps, compute)
        self.cfg, self.post_net_cfg, self.compute = cfg, post_net, compute

    def __call__(
        self, quantized: Float[Array, "m g c"], code_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> DecodedAudio:
        """Decodes items.

        Args:
            quantized: sums of codes (`ResidualQuantizer.decode`), (m, g, code_dim).
            code_lengths: valid code frames of each (m,).
            padded: compute the released, batch dependent variant.

        Raises:
            ValueError: shapes that do not fit.
        """
        if quantized.shape[-1] != self.cfg.code_dim or code_lengths.shape != quantized.shape[:1]:
            raise ValueError(
                f"quantized {quantized.shape} and code_lengths {code_lengths.shape}: expected (items, frames, "
                f"{self.cfg.code_dim}) and (items,)"
            )
        quantized = split_as(quantized, self.compute, CLIPS)
        return self.decode_embedded(self.proj_decoder(quantized), code_lengths, padded=padded)

    def decode_embedded(
        self, embedded: Float[Array, "m g d"], code_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> DecodedAudio:
        """Does as `__call__`, from the output of `proj_decoder`."""
        lengths = split_as(code_lengths, self.compute, CLIPS)
        x = mask_padding(split_as(embedded, self.compute, CLIPS), lengths)
        with jax.named_scope("audio_decoder"):
            x, hidden_lengths = self.dconv1(x, lengths, padded=padded)
            hidden = self.states(x, hidden_lengths)
            coarse, refined, mel_lengths = self.mel(hidden, hidden_lengths, padded=padded)
        return DecodedAudio(hidden, hidden_lengths, coarse, refined, mel_lengths)

    def states(self, x: Float[Array, "m t d"], lengths: Int32[Array, " m"]) -> Float[Array, "m t d"]:
        """Applies sinusoidal positions, the causal layers and the last norm; zero past each length."""
        # Causal by positions within an item; the sinusoids are added to padding too, which no frame sees.
        real = length_mask(lengths, x.shape[1])
        x = x + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype)
        ids = real.astype(jnp.int32)
        positions = jnp.zeros_like(ids) + jnp.arange(x.shape[1], dtype=jnp.int32)
        x = run_encoder(self.layers, x, ids, positions, sizes=self.sizes, compute=self.compute)
        return mask_padding(self.norm(x), lengths)

    def mel(
        self, hidden: Float[Array, "m t d"], lengths: Int32[Array, " m"], *, padded: bool
    ) -> tuple[Float[Array, "m s mels"], Float[Array, "m s mels"], Int32[Array, " m"]]:
        """Returns coarse mel, refined mel, and their lengths, from the 50 Hz states."""
        # 50 Hz -> 100 Hz, then the nearest frame at 62.5 Hz, then the post-net's correction on top.
        coarse, coarse_lengths = self.dconv2(hidden, lengths, padded=padded)
        mel_lengths, frames = self.mel_length(coarse_lengths), self.mel_length(coarse.shape[1])
        if padded:
            # The released code stretches the batch as a whole, and its post-net reads and counts what follows an item.
            whole = jnp.full_like(mel_lengths, coarse.shape[1]), jnp.full_like(mel_lengths, frames)
            coarse = resize_nearest(coarse, *whole, frames)
            real = length_mask(whole[1], frames)
        else:
            coarse = resize_nearest(coarse, coarse_lengths, mel_lengths, frames)
            real = length_mask(mel_lengths, frames)
        refined = coarse + self.post_net(coarse, real)
        return mask_padding(coarse, mel_lengths), mask_padding(refined, mel_lengths), mel_lengths

    def mel_length(self, frames: Frames) -> Frames:
        """Returns frames of the post-net's mel from those of `dconv2`: floor(frames * 5 / 8) at the released rates."""
        # In lowest terms, so that whole numbers stay small and the division exact.
        rise = self.cfg.hop_length * self.post_net_cfg.sampling_rate
        fall = self.cfg.sampling_rate * self.post_net_cfg.hop_length
        common = math.gcd(rise, fall)
        return frames * (rise // common) // (fall // common)
