"""Golden weights of the branches that make sound: audio decoder, flow matching, vocoder (see golden_weights.py)."""

import numpy as np

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.vocoder import VocoderConfig
from tests.helpers.golden_weights import Weights, linear, norm, output, stacked


def conv(ours: str, theirs: str, w: Weights) -> Weights:
    """(out, in, kernel) -> (kernel, in, out)."""
    return {f"{ours}.weight": w[f"{theirs}.weight"].transpose(2, 1, 0), f"{ours}.bias": w[f"{theirs}.bias"]}


def transposed_conv(ours: str, theirs: str, w: Weights) -> Weights:
    """(in, out, kernel) -> (kernel, in, out)."""
    return {f"{ours}.weight": w[f"{theirs}.weight"].transpose(2, 0, 1), f"{ours}.bias": w[f"{theirs}.bias"]}


def whisper_layer(p: str, w: Weights, heads: tuple[int, int], norm_bias: bool = True) -> Weights:
    return (
        norm("attention_norm", f"{p}.self_attn_layer_norm", w, bias=norm_bias)
        | linear("attention.q_proj", f"{p}.self_attn.q_proj", w, heads)
        | linear("attention.k_proj", f"{p}.self_attn.k_proj", w, heads, bias=False)
        | linear("attention.v_proj", f"{p}.self_attn.v_proj", w, heads)
        | output("attention.o_proj", f"{p}.self_attn.out_proj", w, heads)
        | norm("mlp_norm", f"{p}.final_layer_norm", w, bias=norm_bias)
        | linear("mlp.fc1", f"{p}.fc1", w)
        | linear("mlp.fc2", f"{p}.fc2", w)
    )


def audio_decoder(w: Weights, cfg: OmniConfig) -> Weights:
    c, p = cfg.audio, "audio_tokenizer.audio_decoder"
    heads = (c.decoder_attention_heads, c.d_model // c.decoder_attention_heads)
    values = linear("proj_decoder", "audio_tokenizer.audio_bridge_model.proj_decoder", w)
    for name in ("dconv1", "dconv2"):
        values |= transposed_conv(f"{name}.conv", f"{p}.{name}.conv", w) | norm(f"{name}.norm", f"{p}.{name}.norm", w)
    values |= stacked("layers", c.decoder_layers, lambda i: whisper_layer(f"{p}.layers.{i}", w, heads))
    values |= norm("norm", f"{p}.layer_norm", w)
    blocks = len(cfg.post_net.channels) - 1
    for i in range(blocks):
        values |= conv(f"post_net.blocks.{i}.conv.linear", f"{p}.post_net.layers.{3 * i}", w)
        values |= norm(f"post_net.blocks.{i}.norm", f"{p}.post_net.layers.{3 * i + 1}", w)
    return values | conv("post_net.out.linear", f"{p}.post_net.layers.{3 * blocks}", w)


def flow(w: Weights, cfg: OmniConfig) -> Weights:
    c, p = cfg.flow, "audio_tokenizer.audio_flow_matching_decoder.prenet"
    heads = (c.prenet_attention_heads, c.prenet_d_model // c.prenet_attention_heads)
    return (
        linear("prenet.in_fc1", f"{p}.in_mlp.0", w)
        | linear("prenet.in_fc2", f"{p}.in_mlp.2", w)
        | stacked(
            "prenet.layers",
            c.prenet_layers,
            lambda i: whisper_layer(f"{p}.transformer_layers.{i}", w, heads, norm_bias=False),
        )
        | norm("prenet.norm", f"{p}.final_norm", w, bias=False)
        | linear("prenet.out_proj", f"{p}.out_proj", w, bias=False)
        | _estimator(w, cfg)
    )


def _estimator(w: Weights, cfg: OmniConfig) -> Weights:
    c, p = cfg.flow, "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder"
    heads = (c.num_heads, c.attention_head_dim)

    def block(ours: str, theirs: str) -> Weights:
        return conv(f"{ours}.conv.linear", f"{theirs}.block.0", w) | norm(f"{ours}.norm", f"{theirs}.block.2", w)

    def layer(p: str) -> Weights:
        return (
            norm("attention_norm", f"{p}.norm1", w)
            | linear("attention.q_proj", f"{p}.attn1.to_q", w, heads, bias=False)
            | linear("attention.k_proj", f"{p}.attn1.to_k", w, heads, bias=False)
            | linear("attention.v_proj", f"{p}.attn1.to_v", w, heads, bias=False)
            | output("attention.o_proj", f"{p}.attn1.to_out.0", w, heads)
            | norm("mlp_norm", f"{p}.norm3", w)
            | linear("mlp.fc1", f"{p}.ff.net.0.proj", w)
            | linear("mlp.fc2", f"{p}.ff.net.2", w)
        )

    def stage(p: str) -> Weights:
        return (
            block("resnet.block1", f"{p}.0.block1")
            | block("resnet.block2", f"{p}.0.block2")
            | linear("resnet.time_proj", f"{p}.0.mlp.1", w)
            | conv("resnet.shortcut.linear", f"{p}.0.res_conv", w)
            | stacked("layers", c.n_blocks, lambda j: layer(f"{p}.1.{j}"))
        )

    values = (
        linear("time_fc1", f"{p}.time_mlp.linear_1", w)
        | linear("time_fc2", f"{p}.time_mlp.linear_2", w)
        | {f"down.{name}": value for name, value in stage(f"{p}.down_blocks.0").items()}
        | conv("down_conv.linear", f"{p}.down_blocks.0.2", w)
        | stacked("mid", c.num_mid_blocks, lambda i: stage(f"{p}.mid_blocks.{i}"))
        | {f"up.{name}": value for name, value in stage(f"{p}.up_blocks.0").items()}
        | conv("up_conv.linear", f"{p}.up_blocks.0.2", w)
        | block("final_block", f"{p}.final_block")
        | conv("final_proj.linear", f"{p}.final_proj", w)
    )
    return {f"estimator.{name}": value for name, value in values.items()}


def vocoder(w: Weights, cfg: VocoderConfig) -> Weights:
    stages, kernels = len(cfg.upsample_rates), len(cfg.resblock_kernel_sizes)

    def normed(ours: str, theirs: str, transposed: bool = False) -> Weights:
        order = (2, 0, 1) if transposed else (2, 1, 0)
        return {
            f"{ours}.weight_v": w[f"{theirs}.weight_v"].transpose(order),
            f"{ours}.weight_g": w[f"{theirs}.weight_g"].reshape(-1),
            f"{ours}.bias": w[f"{theirs}.bias"],
        }

    def resblock(name: str, dilations: tuple[int, ...]) -> Weights:
        values = {}
        for n in (1, 2):
            for i in range(len(dilations)):
                values |= normed(f"{name}.convs{n}.{i}", f"{name}.convs{n}.{i}")
                values[f"{name}.activations{n}.{i}.alpha"] = w[f"{name}.activations{n}.{i}.alpha"]
        return values

    values = normed("conv_pre", "conv_pre") | normed("conv_post", "conv_post")
    for i in range(5):
        values |= normed(f"f0_predictor.convs.{i}", f"f0_predictor.condnet.{2 * i}")
    values |= linear("f0_predictor.classifier", "f0_predictor.classifier", w)
    values |= linear("source.linear", "m_source.l_linear", w)
    for i in range(stages):
        values |= normed(f"ups.{i}", f"ups.{i}", transposed=True)
        values |= conv(f"source_downs.{i}", f"source_downs.{i}", w)
        values |= resblock(f"source_resblocks.{i}", cfg.source_resblock_dilation_sizes[i])
    for n in range(stages * kernels):
        values |= resblock(f"resblocks.{n}", cfg.resblock_dilation_sizes[n % kernels])
    return {name: np.ascontiguousarray(value) for name, value in values.items()}
