"""From audio to the states that flow matching reads: the frozen audio tokenizer and its decoder, then the flow."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.mel_training import MelTarget
from baichuan_omni_jax.branches import FLOW_MATCHING_BRANCHES, build_branch
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.audio_tokenizer_model import Clips


class FlowMatchingModel(nnx.Module):
    """`audio_encoder`, `audio_decoder` and `flow`: what makes a mel of 24 kHz from a clip, by way of its codes."""

    audio_encoder: AudioEncoderBranch
    audio_decoder: AudioDecoder
    flow: FlowDecoder

    def __init__(self, key: PRNGKeyArray, cfg: OmniConfig, compute: ComputePolicy):
        keys = jax.random.split(key, 3)
        self.branches = FLOW_MATCHING_BRANCHES
        for name, own in zip(self.branches, keys, strict=True):
            setattr(self, name, build_branch(name, own, cfg, compute))

    def hidden(self, clips: Clips) -> tuple[Float[Array, "c t d"], Int32[Array, " c"]]:
        """The decoder's states at 50 Hz of the clips' codes, and how many are valid. No gradient passes."""
        # By way of codes: states of quantized audio are the only ones that the flow gets when it generates.
        codes, valid = self.audio_encoder.encode(clips.mel, clips.lengths)
        quantized = self.audio_encoder.quantizer.decode(codes)
        decoded = self.audio_decoder(quantized, valid.sum(-1, dtype=jnp.int32))
        # The tokenizer is frozen: cut here, nothing of it is kept for a backward pass.
        return jax.lax.stop_gradient(decoded.hidden), decoded.hidden_lengths


def match_lengths(
    hidden: Float[Array, "c t d"], lengths: Int32[Array, " c"], target: MelTarget
) -> tuple[Float[Array, "c t mels"], Int32[Array, " c"]]:
    """Cuts or pads the target's mel to the frames of `hidden` (both come at 50 Hz); returns how many both have, too."""
    frames = hidden.shape[1]
    # Shapes stay static: frames past the shorter of the two count in no loss, so zeros serve.
    mel = jnp.pad(target.mel[:, :frames], ((0, 0), (0, max(0, frames - target.mel.shape[1])), (0, 0)))
    return mel, jnp.minimum(lengths, target.lengths)
