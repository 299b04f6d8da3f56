"""`audio_tokenizer.audio_decoder.*` and the bridge's `proj_decoder` <-> the branch `audio_decoder`."""

from functools import partial

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import conv, linear, norm, upsample_block, whisper_layer
from baichuan_omni_jax.convert.buffers import sinusoids
from baichuan_omni_jax.convert.rules import Rule

DECODER, BRIDGE = "audio_tokenizer.audio_decoder", "audio_tokenizer.audio_bridge_model"
POST_NET = f"{DECODER}.post_net.layers"


def audio_decoder_rules(cfg: OmniConfig) -> list[Rule]:
    """The post-net is a flat list there: convolution, norm and activation of each block, then the last convolution."""
    blocks = len(cfg.post_net.channels) - 1
    return [
        *linear(f"{BRIDGE}.proj_decoder", "proj_decoder"),
        Rule(
            f"{DECODER}.positional_embedding", restore=partial(sinusoids, cfg.audio.max_mel_frames, cfg.audio.d_model)
        ),
        *upsample_block(f"{DECODER}.dconv1", "dconv1"),
        *whisper_layer(f"{DECODER}.layers.{{layer}}", "layers"),
        *norm(f"{DECODER}.layer_norm", "norm"),
        *upsample_block(f"{DECODER}.dconv2", "dconv2"),
        *[rule for i in range(blocks) for rule in conv(f"{POST_NET}.{3 * i}", f"post_net.blocks.{i}.conv")],
        *[rule for i in range(blocks) for rule in norm(f"{POST_NET}.{3 * i + 1}", f"post_net.blocks.{i}.norm")],
        *conv(f"{POST_NET}.{3 * blocks}", "post_net.out"),
    ]
