"""`audio_tokenizer.audio_flow_matching_decoder.*` <-> the branch `flow`."""

from functools import partial

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import conv, into_heads, linear, norm, out_of_heads, whisper_layer
from baichuan_omni_jax.convert.buffers import sinusoids
from baichuan_omni_jax.convert.rules import Rule

PRENET = "audio_tokenizer.audio_flow_matching_decoder.prenet"
UNET = "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder"
# `prenet_max_source_positions` of the released config: the pre-net's buffer, which nothing reads.
POSITIONS = 5000


def flow_rules(cfg: OmniConfig) -> list[Rule]:
    """The pre-net, then the U-Net's three kinds of stages; mid stages are stacked, and layers within each stage."""
    return [
        Rule(f"{PRENET}.positional_embedding", restore=partial(sinusoids, POSITIONS, cfg.flow.prenet_d_model)),
        *linear(f"{PRENET}.in_mlp.0", "prenet.in_fc1"),
        *linear(f"{PRENET}.in_mlp.2", "prenet.in_fc2"),
        *whisper_layer(f"{PRENET}.transformer_layers.{{layer}}", "prenet.layers", norm_bias=False),
        *norm(f"{PRENET}.final_norm", "prenet.norm", bias=False),
        *linear(f"{PRENET}.out_proj", "prenet.out_proj", bias=False),
        *linear(f"{UNET}.time_mlp.linear_1", "estimator.time_fc1"),
        *linear(f"{UNET}.time_mlp.linear_2", "estimator.time_fc2"),
        *_stage(f"{UNET}.down_blocks.0", "estimator.down"),
        *conv(f"{UNET}.down_blocks.0.2", "estimator.down_conv"),
        *_stage(f"{UNET}.mid_blocks.{{stage}}", "estimator.mid"),
        *_stage(f"{UNET}.up_blocks.0", "estimator.up"),
        *conv(f"{UNET}.up_blocks.0.2", "estimator.up_conv"),
        *_causal_block(f"{UNET}.final_block", "estimator.final_block"),
        *conv(f"{UNET}.final_proj", "estimator.final_proj"),
    ]


def _stage(theirs: str, ours: str) -> list[Rule]:
    """A ResNet block (`.0`) and its transformer layers (`.1.0`, `.1.1`, ...)."""
    return [
        *_causal_block(f"{theirs}.0.block1", f"{ours}.resnet.block1"),
        *_causal_block(f"{theirs}.0.block2", f"{ours}.resnet.block2"),
        *linear(f"{theirs}.0.mlp.1", f"{ours}.resnet.time_proj"),
        *conv(f"{theirs}.0.res_conv", f"{ours}.resnet.shortcut"),
        *_transformer_layer(f"{theirs}.1.{{layer}}", f"{ours}.layers"),
    ]


def _causal_block(theirs: str, ours: str) -> list[Rule]:
    return conv(f"{theirs}.block.0", f"{ours}.conv") + norm(f"{theirs}.block.2", f"{ours}.norm")


def _transformer_layer(theirs: str, ours: str) -> list[Rule]:
    return [
        *norm(f"{theirs}.norm1", f"{ours}.attention_norm"),
        *into_heads(f"{theirs}.attn1.to_q", f"{ours}.attention.q_proj", bias=False),
        *into_heads(f"{theirs}.attn1.to_k", f"{ours}.attention.k_proj", bias=False),
        *into_heads(f"{theirs}.attn1.to_v", f"{ours}.attention.v_proj", bias=False),
        *out_of_heads(f"{theirs}.attn1.to_out.0", f"{ours}.attention.o_proj"),
        *norm(f"{theirs}.norm3", f"{ours}.mlp_norm"),
        *linear(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.fc1"),
        *linear(f"{theirs}.ff.net.2", f"{ours}.mlp.fc2"),
    ]
