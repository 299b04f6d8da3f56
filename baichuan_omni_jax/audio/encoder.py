"""The Whisper encoder of the audio tokenizer (`audio_tokenizer.audio_model.*`): mel frames -> states at 50 Hz.

A clip's result never depends on what it is batched with: mel frames and the first convolution's output are zero past
the clip's end, as if it were alone. The released code leaves the latter non-zero, which `padded=True` repeats.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.nn.conv import Conv1d
from baichuan_omni_jax.nn.encoder import EncoderLayer, EncoderSizes, gelu, run_encoder
from baichuan_omni_jax.nn.lengths import frames_before
from baichuan_omni_jax.nn.norm import LayerNorm
from baichuan_omni_jax.nn.param import ComputePolicy, split_as, stack

CLIPS = "batch"
# Spread of the random convolutions: as large as the sinusoids added to them, or every clip of an untrained encoder
# would sound alike.
GAINS = (3.0, 4.0)


def sinusoids(length: int, width: int) -> Float[Array, "t d"]:
    """Position table, fp32: angle = position * 10000^(-i / (width/2 - 1)); all sines, then all cosines.

    width 4: frequencies 1 and 0.0001, so position 2 is [sin 2, sin 0.0002, cos 2, cos 0.0002].
    """
    frequency = 10000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2 - 1))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


def encoder_lengths(mel_lengths: Int32[Array, " m"], stride: int) -> Int32[Array, " m"]:
    """Frames after the strided convolution: (frames - 1) // stride + 1; 0 stays 0."""
    return (mel_lengths - 1) // stride + 1


class AudioEncoder(nnx.Module):
    """Two convolutions, sinusoidal positions, pre-norm layers over the clip's own frames, LayerNorm."""

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        self.sizes = EncoderSizes(
            width=cfg.d_model,
            heads=cfg.encoder_attention_heads,
            ffn=cfg.encoder_ffn_dim,
            eps=cfg.norm_eps,
            rows=(CLIPS, None),
            key_bias=False,
        )
        padding, d = cfg.kernel_size // 2, cfg.d_model
        conv1, conv2 = (cfg.kernel_size, cfg.num_mel_bins, d), (cfg.kernel_size, d, d)
        self.conv1 = Conv1d(keys[0], conv1, padding=padding, rows=CLIPS, compute=compute, gain=GAINS[0])
        self.conv2 = Conv1d(
            keys[1], conv2, padding=padding, stride=cfg.stride_size, rows=CLIPS, compute=compute, gain=GAINS[1]
        )
        self.layers = stack(lambda k: EncoderLayer(k, self.sizes, compute), keys[2], cfg.encoder_layers)
        self.norm = LayerNorm(d, eps=cfg.norm_eps, compute=compute)
        self.cfg, self.compute = cfg, compute

    def __call__(
        self, mel: Float[Array, "m f mels"], mel_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> Float[Array, "m t d"]:
        """States (m, (f-1)//2 + 1, d) of the clips, zero past each clip's encoder length.

        `mel` is one window of at most 30 s a row, `mel_lengths` its valid frames (0: an unused slot). `padded` computes
        the released, batch dependent variant. Raises ValueError on shapes that do not fit.
        """
        if mel.shape[-1] != self.cfg.num_mel_bins or mel_lengths.shape != mel.shape[:1]:
            raise ValueError(
                f"mel {mel.shape} and mel_lengths {mel_lengths.shape}: expected (clips, frames, "
                f"{self.cfg.num_mel_bins}) and (clips,)"
            )
        mel, mel_lengths = split_as(mel, self.compute, CLIPS), split_as(mel_lengths, self.compute, CLIPS)
        with jax.named_scope("convolutions"):
            real = frames_before(mel_lengths, mel.shape[1])[..., None]
            x = gelu(self.conv1(jnp.where(real, mel, 0)))
            x = gelu(self.conv2(x if padded else jnp.where(real, x, 0)))
        x = x + sinusoids(x.shape[1], x.shape[2]).astype(x.dtype)
        real = frames_before(encoder_lengths(mel_lengths, self.cfg.stride_size), x.shape[1])
        ids = real.astype(jnp.int32)
        x = run_encoder(self.layers, x, ids, jnp.zeros_like(ids), sizes=self.sizes, compute=self.compute)
        return jnp.where(real[..., None], self.norm(x), 0)
