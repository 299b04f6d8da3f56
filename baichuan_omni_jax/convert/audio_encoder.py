"""`audio_tokenizer.audio_model.*` and most of `audio_tokenizer.audio_bridge_model.*` <-> the branch `audio_encoder`."""

from functools import partial

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import conv, linear, norm, whisper_layer
from baichuan_omni_jax.convert.buffers import sinusoids
from baichuan_omni_jax.convert.rules import Rule

ENCODER, BRIDGE = "audio_tokenizer.audio_model", "audio_tokenizer.audio_bridge_model"


def audio_encoder_rules(cfg: OmniConfig) -> list[Rule]:
    """Codebooks come with the running sums that training them needs (`embed_avg`, `cluster_size`)."""
    audio = cfg.audio
    positions = audio.encoder_length(audio.max_mel_frames)
    return [
        Rule(f"{ENCODER}.positional_embedding", restore=partial(sinusoids, positions, audio.d_model)),
        *conv(f"{ENCODER}.conv1", "encoder.conv1"),
        *conv(f"{ENCODER}.conv2", "encoder.conv2"),
        *whisper_layer(f"{ENCODER}.layers.{{layer}}", "encoder.layers"),
        *norm(f"{ENCODER}.layer_norm", "encoder.norm"),
        # Convolutions whose windows do not overlap: matrices over four states here.
        Rule(f"{BRIDGE}.gate_proj.weight", "bridge.gate_proj.weight", "o i k -> k i o"),
        Rule(f"{BRIDGE}.up_proj.weight", "bridge.up_proj.weight", "o i k -> k i o"),
        *linear(f"{BRIDGE}.down_proj", "bridge.down_proj", bias=False),
        *norm(f"{BRIDGE}.layer_norm", "bridge.norm"),
        *[
            Rule(f"{BRIDGE}.vq_list.{{q}}.codebook.{name}", f"quantizer.levels.{{q}}.{name}")
            for name in ("embed", "embed_avg", "cluster_size")
        ],
    ]
