"""The rules of every branch: the released checkpoint's tensor names on the left, our parameters on the right.

The model's own files hold six branches (arXiv:2501.15368); the vocoder's, `hift.pt`, is a file of its own. `{layer}`,
`{stage}` and the like stand for numbers (see `rules.py`). The public models that the release was built from have the
same layers under other names: `qwen2_rules`, `qwen2_vl_rules`, `whisper_rules`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from baichuan_omni_jax.branches import MODEL_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.convert.rules import (
    Rule,
    conv,
    into_heads,
    linear,
    norm,
    out_of_heads,
    packed_heads,
    upsample_block,
    whisper_layer,
)

VISION_TOWER, VISION_PROJECTOR = "model.visual_model", "model.visual_bridge_model"
AUDIO_ENCODER, AUDIO_BRIDGE = "audio_tokenizer.audio_model", "audio_tokenizer.audio_bridge_model"
AUDIO_DECODER = "audio_tokenizer.audio_decoder"
PRENET = "audio_tokenizer.audio_flow_matching_decoder.prenet"
UNET = "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder"

# `prenet_max_source_positions` of the released config: the length of the pre-net's buffer, which nothing reads.
_PRENET_POSITIONS = 5000
# Convolutions of the F0 predictor; activations lie between them in the checkpoint's list.
_F0_CONVS = 5


def branch_rules(cfg: OmniConfig, vocoder: VocoderConfig | None = None) -> dict[str, tuple[Rule, ...]]:
    """Returns branch -> its table, for a model of this configuration, and for a vocoder if one is given."""
    makers: dict[str, Callable[[OmniConfig], list[Rule]]] = {
        "vision": vision_rules,
        "audio_encoder": audio_encoder_rules,
        "audio_decoder": audio_decoder_rules,
        "llm": llm_rules,
        "audio_head": audio_head_rules,
        "flow": flow_rules,
    }
    tables = {name: tuple(makers[name](cfg)) for name in MODEL_BRANCHES}
    return tables | ({VOCODER_BRANCH: tuple(vocoder_rules(vocoder))} if vocoder else {})


def vision_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `model.visual_model.*` and `model.visual_bridge_model.*`.

    The patch embedding is a convolution over (temporal, row, column) there, a matrix for each time here.
    """
    block, layers = f"{VISION_TOWER}.blocks.{{layer}}", "tower.layers"
    area = (("c", cfg.vision.in_channels), ("y", cfg.vision.patch_size), ("x", cfg.vision.patch_size))
    patches = f"{VISION_TOWER}.patch_embed.proj.weight"
    return [
        Rule(patches, "tower.patch_embedding.kernel", "d c t y x -> t (c y x) d", area),
        # The tower's layers, stacked.
        *norm(f"{block}.norm1", f"{layers}.attention_norm"),
        *packed_heads(f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", f"{layers}.attention"),
        *out_of_heads(f"{block}.attn.proj", f"{layers}.attention.o_proj"),
        *norm(f"{block}.norm2", f"{layers}.mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{layers}.mlp.fc1"),
        *linear(f"{block}.mlp.fc2", f"{layers}.mlp.fc2"),
        # The projector, whose first matrix reads four neighboring patches, one after the other on the input axis.
        *norm(f"{VISION_PROJECTOR}.ln_q", "projector.norm"),
        Rule(f"{VISION_PROJECTOR}.mlp.0.weight", "projector.fc1.weight", "f (g d) -> g d f"),
        Rule(f"{VISION_PROJECTOR}.mlp.0.bias", "projector.fc1.bias"),
        *linear(f"{VISION_PROJECTOR}.mlp.2", "projector.fc2"),
    ]


def audio_encoder_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `audio_tokenizer.audio_model.*` and most of `audio_tokenizer.audio_bridge_model.*`.

    Codebooks come with the running sums that training them needs (`embed_avg`, `cluster_size`).
    """
    positions = cfg.audio.encoder_length(cfg.audio.max_mel_frames)
    return [
        # Whisper's encoder: its position table is computed, so it is no parameter here.
        Rule(f"{AUDIO_ENCODER}.positional_embedding", restore=partial(sinusoids, positions, cfg.audio.d_model)),
        *conv(f"{AUDIO_ENCODER}.conv1", "encoder.conv1"),
        *conv(f"{AUDIO_ENCODER}.conv2", "encoder.conv2"),
        *whisper_layer(f"{AUDIO_ENCODER}.layers.{{layer}}", "encoder.layers"),
        *norm(f"{AUDIO_ENCODER}.layer_norm", "encoder.norm"),
        # The bridge: convolutions whose windows do not overlap are matrices over four states here.
        Rule(f"{AUDIO_BRIDGE}.gate_proj.weight", "bridge.gate_proj.weight", "o i k -> k i o"),
        Rule(f"{AUDIO_BRIDGE}.up_proj.weight", "bridge.up_proj.weight", "o i k -> k i o"),
        *linear(f"{AUDIO_BRIDGE}.down_proj", "bridge.down_proj", bias=False),
        *norm(f"{AUDIO_BRIDGE}.layer_norm", "bridge.norm"),
        # The residual quantizer, a codebook a level.
        *[
            Rule(f"{AUDIO_BRIDGE}.vq_list.{{q}}.codebook.{name}", f"quantizer.levels.{{q}}.{name}")
            for name in ("embed", "embed_avg", "cluster_size")
        ],
    ]


def audio_decoder_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `audio_tokenizer.audio_decoder.*` and the bridge's `proj_decoder`.

    The post-net is a flat list there: convolution, norm and activation of each block, then the last convolution.
    """
    post_net, blocks = f"{AUDIO_DECODER}.post_net.layers", len(cfg.post_net.channels) - 1
    positions = partial(sinusoids, cfg.audio.max_mel_frames, cfg.audio.d_model)
    return [
        # From the sum of codes into the decoder's width: it lies with the bridge in the checkpoint.
        *linear(f"{AUDIO_BRIDGE}.proj_decoder", "proj_decoder"),
        Rule(f"{AUDIO_DECODER}.positional_embedding", restore=positions),
        # 12.5 to 50 Hz, the layers, 50 to 100 Hz.
        *upsample_block(f"{AUDIO_DECODER}.dconv1", "dconv1"),
        *whisper_layer(f"{AUDIO_DECODER}.layers.{{layer}}", "layers"),
        *norm(f"{AUDIO_DECODER}.layer_norm", "norm"),
        *upsample_block(f"{AUDIO_DECODER}.dconv2", "dconv2"),
        # The post-net: the third of each block is an activation, which has no tensor.
        *[rule for i in range(blocks) for rule in conv(f"{post_net}.{3 * i}", f"post_net.blocks.{i}.conv")],
        *[rule for i in range(blocks) for rule in norm(f"{post_net}.{3 * i + 1}", f"post_net.blocks.{i}.norm")],
        *conv(f"{post_net}.{3 * blocks}", "post_net.out"),
    ]


def llm_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `model.embed_tokens`, `model.layers.*`, `model.norm` and `lm_head`.

    Q, K and V lie in one `W_pack`, or with `qkv_pack` off (Qwen2.5's own names) in three projections.
    """
    layer = "model.layers.{layer}"
    attention = f"{layer}.self_attn"
    if cfg.llm.qkv_pack:
        qkv = packed_heads(f"{attention}.W_pack.weight", f"{attention}.W_pack.bias", "layers.attention")
    else:
        qkv = [rule for w in "qkv" for rule in into_heads(f"{attention}.{w}_proj", f"layers.attention.{w}_proj")]
    return [
        Rule("model.embed_tokens.weight", "embedding"),
        *norm(f"{layer}.input_layernorm", "layers.attention_norm", bias=False),
        # Attention, then the gated MLP: only Q, K and V have biases.
        *qkv,
        *out_of_heads(f"{attention}.o_proj", "layers.attention.o_proj", bias=False),
        *norm(f"{layer}.post_attention_layernorm", "layers.mlp_norm", bias=False),
        *linear(f"{layer}.mlp.gate_proj", "layers.mlp.gate_proj", bias=False),
        *linear(f"{layer}.mlp.up_proj", "layers.mlp.up_proj", bias=False),
        *linear(f"{layer}.mlp.down_proj", "layers.mlp.down_proj", bias=False),
        *norm("model.norm", "norm", bias=False),
        Rule("lm_head.weight", "head"),
    ]


def audio_head_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `model.audio_embed_layers.*` and `audio_head.*`.

    The MLP of each depth is a slice of one wide matrix there. Its biases are never added; they are carried.
    """
    layer = "audio_head.transformer_layers.{layer}"
    attention = f"{layer}.self_attention"
    return [
        # A table and a head a level, each with one row more than the codebook has codes: the end of speech.
        Rule("model.audio_embed_layers.{q}.weight", "embedding.tables.{q}"),
        *norm(f"{layer}.layernorm1", "head.layers.attention_norm", bias=False),
        *packed_heads(f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", "head.layers.attention"),
        *out_of_heads(f"{attention}.out_proj", "head.layers.attention.o_proj"),
        *norm(f"{layer}.layernorm2", "head.layers.mlp_norm", bias=False),
        # One matrix for all depths there, an axis of its own here.
        Rule(f"{layer}.linear1.weight", "head.layers.linear1.weight", "f (q d) -> f q d"),
        Rule(f"{layer}.linear1.bias", "head.layers.unused_bias1"),
        Rule(f"{layer}.linear2.weight", "head.layers.linear2.weight", "d (q f) -> d q f"),
        Rule(f"{layer}.linear2.bias", "head.layers.unused_bias2"),
        *norm("audio_head.headnorm", "head.norm", bias=False),
        *linear("audio_head.heads.{q}", "head.heads.{q}"),
    ]


def flow_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of `audio_tokenizer.audio_flow_matching_decoder.*`.

    The pre-net, then the U-Net's three kinds of stages; mid stages are stacked, and layers within each stage.
    """
    return [
        # Pre-net: Whisper layers with RMSNorm.
        Rule(f"{PRENET}.positional_embedding", restore=partial(sinusoids, _PRENET_POSITIONS, cfg.flow.prenet_d_model)),
        *linear(f"{PRENET}.in_mlp.0", "prenet.in_fc1"),
        *linear(f"{PRENET}.in_mlp.2", "prenet.in_fc2"),
        *whisper_layer(f"{PRENET}.transformer_layers.{{layer}}", "prenet.layers", norm_bias=False),
        *norm(f"{PRENET}.final_norm", "prenet.norm", bias=False),
        *linear(f"{PRENET}.out_proj", "prenet.out_proj", bias=False),
        # Estimator: time, one stage down, the stages in the middle, one up.
        *linear(f"{UNET}.time_mlp.linear_1", "estimator.time_fc1"),
        *linear(f"{UNET}.time_mlp.linear_2", "estimator.time_fc2"),
        *_flow_stage(f"{UNET}.down_blocks.0", "estimator.down"),
        *conv(f"{UNET}.down_blocks.0.2", "estimator.down_conv"),
        *_flow_stage(f"{UNET}.mid_blocks.{{stage}}", "estimator.mid"),
        *_flow_stage(f"{UNET}.up_blocks.0", "estimator.up"),
        *conv(f"{UNET}.up_blocks.0.2", "estimator.up_conv"),
        *_causal_block(f"{UNET}.final_block", "estimator.final_block"),
        *conv(f"{UNET}.final_proj", "estimator.final_proj"),
    ]


def _flow_stage(tensor: str, parameter: str) -> list[Rule]:
    """Lists the rules of a ResNet block (`.0`) and of its transformer layers (`.1.0`, `.1.1`, ...)."""
    layer, layers = f"{tensor}.1.{{layer}}", f"{parameter}.layers"
    return [
        # ResNet block, with a projection of the time and a 1x1 shortcut.
        *_causal_block(f"{tensor}.0.block1", f"{parameter}.resnet.block1"),
        *_causal_block(f"{tensor}.0.block2", f"{parameter}.resnet.block2"),
        *linear(f"{tensor}.0.mlp.1", f"{parameter}.resnet.time_proj"),
        *conv(f"{tensor}.0.res_conv", f"{parameter}.resnet.shortcut"),
        # Transformer layers: diffusers' names, in which `norm2` is that of a cross-attention there is none of.
        *norm(f"{layer}.norm1", f"{layers}.attention_norm"),
        *into_heads(f"{layer}.attn1.to_q", f"{layers}.attention.q_proj", bias=False),
        *into_heads(f"{layer}.attn1.to_k", f"{layers}.attention.k_proj", bias=False),
        *into_heads(f"{layer}.attn1.to_v", f"{layers}.attention.v_proj", bias=False),
        *out_of_heads(f"{layer}.attn1.to_out.0", f"{layers}.attention.o_proj"),
        *norm(f"{layer}.norm3", f"{layers}.mlp_norm"),
        *linear(f"{layer}.ff.net.0.proj", f"{layers}.mlp.fc1"),
        *linear(f"{layer}.ff.net.2", f"{layers}.mlp.fc2"),
    ]


def _causal_block(tensor: str, parameter: str) -> list[Rule]:
    return conv(f"{tensor}.block.0", f"{parameter}.conv") + norm(f"{tensor}.block.2", f"{parameter}.norm")


def vocoder_rules(cfg: VocoderConfig) -> list[Rule]:
    """Lists the rules of a HiFT vocoder's own file (`hift.pt`). Weight-norm pairs stay pairs.

    Most names are the checkpoint's; its convolutions are (out, in, kernel), ours (kernel, in, out).
    """
    blocks = ("resblocks.{n}", "source_resblocks.{n}")
    convs = {f"f0_predictor.condnet.{2 * i}": f"f0_predictor.convs.{i}" for i in range(_F0_CONVS)}
    convs |= {name: name for name in ("conv_pre", "conv_post")}
    convs |= {name: name for block in blocks for name in (f"{block}.convs1.{{i}}", f"{block}.convs2.{{i}}")}
    snakes = [f"{block}.activations{i}.{{i}}.alpha" for block in blocks for i in (1, 2)]
    return [
        *[rule for tensor, parameter in convs.items() for rule in _weight_normed(tensor, parameter, "o i k -> k i o")],
        # Axis 0 of a transposed convolution is its input.
        *_weight_normed("ups.{n}", "ups.{n}", "i o k -> k i o"),
        # Pitch predictor's last layer, the source's mixing of harmonics, and how the source enters each stage.
        *linear("f0_predictor.classifier", "f0_predictor.classifier"),
        *linear("m_source.l_linear", "source.linear"),
        Rule("source_downs.{n}.weight", "source_downs.{n}.weight", "o i k -> k i o"),
        Rule("source_downs.{n}.bias", "source_downs.{n}.bias"),
        # The learned frequency of each Snake activation.
        *[Rule(name, name) for name in snakes],
    ]


def _weight_normed(tensor: str, parameter: str, axes: str) -> list[Rule]:
    return [
        Rule(f"{tensor}.weight_v", f"{parameter}.weight_v", axes),
        Rule(f"{tensor}.weight_g", f"{parameter}.weight_g", "n 1 1 -> n"),
        Rule(f"{tensor}.bias", f"{parameter}.bias"),
    ]


def qwen2_rules(cfg: OmniConfig) -> list[Rule]:
    """Lists the rules of a Qwen2 or Qwen2.5: Q, K and V in three projections."""
    return llm_rules(replace(cfg, llm=replace(cfg.llm, qkv_pack=False)))


def qwen2_vl_rules(cfg: OmniConfig, home: str = "visual.", *, projector: bool = True) -> list[Rule]:
    """Lists the rules of Qwen2-VL's tower, whose names begin with `home`, and of its merger where `projector` is on."""
    homes = {f"{VISION_TOWER}.": home} | ({f"{VISION_PROJECTOR}.": f"{home}merger."} if projector else {})
    return _renamed(vision_rules(cfg), homes)


def whisper_rules(cfg: OmniConfig, home: str = "model.encoder.") -> list[Rule]:
    """Lists the rules of Whisper's encoder, whose names begin with `home`; its positions are a buffer there too."""
    rules = _renamed(audio_encoder_rules(cfg), {f"{AUDIO_ENCODER}.": home})
    positions = f"{home}positional_embedding"
    return [replace(r, tensor=f"{home}embed_positions.weight") if r.tensor == positions else r for r in rules]


def _renamed(rules: list[Rule], homes: Mapping[str, str]) -> list[Rule]:
    """Keeps the rules whose tensors begin with a key of `homes`, with its value in the key's place."""
    return [
        replace(rule, tensor=theirs + rule.tensor.removeprefix(ours))
        for rule in rules
        for ours, theirs in homes.items()
        if rule.tensor.startswith(ours)
    ]


def sinusoids(length: int, width: int) -> np.ndarray:
    """Computes the position table (length, width), fp32: all sines, then all cosines, of audio encoder and decoders.

    Rounded as the released code does it: frequencies as fp32 exponentials, angles as fp32 products.
    """
    half = width // 2
    step = np.float32(math.log(10000.0) / (half - 1))
    frequencies = np.exp(-step * np.arange(half, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)
