"""The branch `audio_encoder`: from mel windows to codes at 12.5 Hz (encoder, bridge, residual quantizer)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.bridge import AudioBridge
from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.audio.encoder import CLIPS, AudioEncoder, encoder_lengths
from baichuan_omni_jax.audio.quantizer import Codebooks, ResidualQuantizer
from baichuan_omni_jax.nn.lengths import frames_before
from baichuan_omni_jax.nn.param import ComputePolicy, split_as


class AudioTokenizer(nnx.Module):
    """Whisper encoder -> bridge -> residual quantizer. Clips are split over the batch axes."""

    def __init__(self, key: PRNGKeyArray, cfg: AudioConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        self.encoder = AudioEncoder(keys[0], cfg, compute)
        self.bridge = AudioBridge(keys[1], cfg, compute)
        self.quantizer = ResidualQuantizer(keys[2], cfg, compute)
        self.cfg, self.compute = cfg, compute

    def features(
        self, mel: Float[Array, "m f mels"], mel_lengths: Int32[Array, " m"], *, padded: bool = False
    ) -> tuple[Float[Array, "m g d"], Bool[Array, "m g"]]:
        """What the quantizer reads, (m, bridge frames, code_dim), and which of it is valid. Differentiable.

        `padded`: the released, batch dependent convolutions (see `AudioEncoder`).
        """
        with jax.named_scope("audio_encoder"):
            features = self.bridge(self.encoder(mel, mel_lengths, padded=padded))
        mel_lengths = split_as(mel_lengths, self.compute, CLIPS)
        lengths = encoder_lengths(mel_lengths, self.cfg.stride_size) // self.cfg.avg_pooler
        return features, frames_before(lengths, features.shape[1])

    def encode(
        self,
        mel: Float[Array, "m f mels"],
        mel_lengths: Int32[Array, " m"],
        *,
        padded: bool = False,
        codebooks: Codebooks | None = None,
    ) -> tuple[Int32[Array, "m g q"], Bool[Array, "m g"]]:
        """Codes (m, bridge frames, levels) and which frames are valid; codes of the others are 0.

        One window of at most 30 s a row; `mel_lengths` counts its valid mel frames, 0 for an unused slot.
        `codebooks`: see `ResidualQuantizer.quantize`.
        """
        features, valid = self.features(mel, mel_lengths, padded=padded)
        codes, _, _ = self.quantizer.quantize(features, codebooks)
        return jnp.where(valid[..., None], codes, 0), valid
