"""Golden weights under our parameters' names, name by name: the oracle of a conversion, spelled out by hand.

Every function takes the checkpoint (name -> fp32 array) and returns parameter -> array. `{}` in a
checkpoint name is the layer, whose arrays are stacked. Torch linears are (out, in), ours (in, out).
"""

import json
from collections.abc import Callable, Mapping

import numpy as np
from safetensors import safe_open

from baichuan_omni_jax.config import OmniConfig, from_hf
from tests.helpers.golden import golden_path

Weights = Mapping[str, np.ndarray]


def golden_config() -> OmniConfig:
    return from_hf(json.loads(golden_path("omni_a/config.json").read_text()))


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of `omni_a/NAME.safetensors`; bf16 as fp32, int64 as int32."""
    with safe_open(golden_path(f"omni_a/{name}.safetensors"), "flax") as file:
        arrays = {key: np.asarray(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    return {key: x.astype(np.int32 if x.dtype.kind == "i" else np.float32) for key, x in arrays.items()}


def linear(ours: str, theirs: str, w: Weights, heads: tuple[int, int] | None = None, bias: bool = True) -> Weights:
    """A projection (out, in) -> (in, out), or (in, heads, head_dim) of a Q, K, V."""
    weight = w[f"{theirs}.weight"].T
    values = {"weight": weight.reshape(-1, *heads) if heads else weight}
    if bias:
        values["bias"] = w[f"{theirs}.bias"].reshape(heads) if heads else w[f"{theirs}.bias"]
    return {f"{ours}.{name}": value for name, value in values.items()}


def output(ours: str, theirs: str, w: Weights, heads: tuple[int, int], bias: bool = True) -> Weights:
    """An attention output (d, heads * head_dim) -> (heads, head_dim, d)."""
    values = linear(ours, theirs, w, bias=bias)
    return values | {f"{ours}.weight": values[f"{ours}.weight"].reshape(*heads, -1)}


def packed_qkv(ours: str, weight: np.ndarray, bias: np.ndarray, heads: int, kv_heads: int) -> Weights:
    """Q, K, V stacked on the output axis -> three projections (d, n, h) and their biases."""
    h = weight.shape[0] // (heads + 2 * kv_heads)
    bounds = np.cumsum([heads * h, kv_heads * h])
    values = {}
    for name, part, part_bias in zip("qkv", np.split(weight, bounds), np.split(bias, bounds), strict=True):
        values[f"{ours}.{name}_proj.weight"] = part.T.reshape(weight.shape[1], -1, h)
        values[f"{ours}.{name}_proj.bias"] = part_bias.reshape(-1, h)
    return values


def norm(ours: str, theirs: str, w: Weights, bias: bool = True) -> Weights:
    values = {f"{ours}.scale": w[f"{theirs}.weight"]}
    return values | ({f"{ours}.bias": w[f"{theirs}.bias"]} if bias else {})


def stacked(prefix: str, count: int, layer: Callable[[int], Weights]) -> Weights:
    layers = [layer(i) for i in range(count)]
    return {f"{prefix}.{name}": np.stack([values[name] for values in layers]) for name in layers[0]}


def vision(w: Weights, cfg: OmniConfig) -> Weights:
    c, t, b = cfg.vision, "model.visual_model", "model.visual_bridge_model"
    heads = (c.num_heads, c.head_dim)

    def layer(i: int) -> Weights:
        p = f"{t}.blocks.{i}"
        qkv = packed_qkv("attention", w[f"{p}.attn.qkv.weight"], w[f"{p}.attn.qkv.bias"], c.num_heads, c.num_heads)
        return (
            norm("attention_norm", f"{p}.norm1", w)
            | qkv
            | output("attention.o_proj", f"{p}.attn.proj", w, heads)
            | norm("mlp_norm", f"{p}.norm2", w)
            | linear("mlp.fc1", f"{p}.mlp.fc1", w)
            | linear("mlp.fc2", f"{p}.mlp.fc2", w)
        )

    kernel = w[f"{t}.patch_embed.proj.weight"].transpose(2, 1, 3, 4, 0)
    fc1 = linear("projector.fc1", f"{b}.mlp.0", w)
    fc1["projector.fc1.weight"] = fc1["projector.fc1.weight"].reshape(c.merged_patches, c.embed_dim, -1)
    return (
        {"tower.patch_embedding.kernel": kernel.reshape(c.temporal_patch_size, c.patch_values, c.embed_dim)}
        | stacked("tower.layers", c.depth, layer)
        | norm("projector.norm", f"{b}.ln_q", w)
        | fc1
        | linear("projector.fc2", f"{b}.mlp.2", w)
    )


def audio_tokenizer(w: Weights, cfg: OmniConfig) -> Weights:
    c, e, b = cfg.audio, "audio_tokenizer.audio_model", "audio_tokenizer.audio_bridge_model"
    heads = (c.encoder_attention_heads, c.head_dim)

    def layer(i: int) -> Weights:
        p = f"{e}.layers.{i}"
        return (
            norm("attention_norm", f"{p}.self_attn_layer_norm", w)
            | linear("attention.q_proj", f"{p}.self_attn.q_proj", w, heads)
            | linear("attention.k_proj", f"{p}.self_attn.k_proj", w, heads, bias=False)
            | linear("attention.v_proj", f"{p}.self_attn.v_proj", w, heads)
            | output("attention.o_proj", f"{p}.self_attn.out_proj", w, heads)
            | norm("mlp_norm", f"{p}.final_layer_norm", w)
            | linear("mlp.fc1", f"{p}.fc1", w)
            | linear("mlp.fc2", f"{p}.fc2", w)
        )

    def conv(ours: str, theirs: str, bias: bool = True) -> Weights:
        values = {f"{ours}.weight": w[f"{theirs}.weight"].transpose(2, 1, 0)}
        return values | ({f"{ours}.bias": w[f"{theirs}.bias"]} if bias else {})

    codebooks = {
        f"quantizer.levels.{q}.{name}": w[f"{b}.vq_list.{q}.codebook.{name}"]
        for q in range(c.levels)
        for name in ("embed", "embed_avg", "cluster_size")
    }
    return (
        conv("encoder.conv1.linear", f"{e}.conv1")
        | conv("encoder.conv2.linear", f"{e}.conv2")
        | stacked("encoder.layers", c.encoder_layers, layer)
        | norm("encoder.norm", f"{e}.layer_norm", w)
        | conv("bridge.gate_proj", f"{b}.gate_proj", bias=False)
        | conv("bridge.up_proj", f"{b}.up_proj", bias=False)
        | linear("bridge.down_proj", f"{b}.down_proj", w, bias=False)
        | norm("bridge.norm", f"{b}.layer_norm", w)
        | codebooks
    )


def audio_head(w: Weights, cfg: OmniConfig) -> Weights:
    d, depth = cfg.llm.hidden_size, cfg.audio.levels
    heads = (d // cfg.audio_head.head_dim, cfg.audio_head.head_dim)

    def layer(i: int) -> Weights:
        p = f"audio_head.transformer_layers.{i}"
        a = f"{p}.self_attention"
        return (
            norm("attention_norm", f"{p}.layernorm1", w, bias=False)
            | packed_qkv("attention", w[f"{a}.in_proj_weight"], w[f"{a}.in_proj_bias"], heads[0], heads[0])
            | output("attention.o_proj", f"{a}.out_proj", w, heads)
            | norm("mlp_norm", f"{p}.layernorm2", w, bias=False)
            | {
                "linear1.weight": w[f"{p}.linear1.weight"].reshape(2 * d, depth, d),
                "linear2.weight": w[f"{p}.linear2.weight"].reshape(d, depth, 2 * d),
                "unused_bias1": w[f"{p}.linear1.bias"],
                "unused_bias2": w[f"{p}.linear2.bias"],
            }
        )

    values = stacked("head.layers", cfg.audio_head.num_layers, layer)
    values = {**values, **norm("head.norm", "audio_head.headnorm", w, bias=False)}
    for q in range(depth):
        values[f"embedding.tables.{q}"] = w[f"model.audio_embed_layers.{q}.weight"]
        values |= linear(f"head.heads.{q}", f"audio_head.heads.{q}", w)
    return values


def language_model(w: Weights, cfg: OmniConfig) -> Weights:
    c = cfg.llm

    def layer(i: int) -> Weights:
        p = f"model.layers.{i}"
        pack = f"{p}.self_attn.W_pack"
        return (
            norm("attention_norm", f"{p}.input_layernorm", w, bias=False)
            | packed_qkv("attention", w[f"{pack}.weight"], w[f"{pack}.bias"], c.num_heads, c.num_kv_heads)
            | output("attention.o_proj", f"{p}.self_attn.o_proj", w, (c.num_heads, c.head_dim), bias=False)
            | norm("mlp_norm", f"{p}.post_attention_layernorm", w, bias=False)
            | linear("mlp.gate_proj", f"{p}.mlp.gate_proj", w, bias=False)
            | linear("mlp.up_proj", f"{p}.mlp.up_proj", w, bias=False)
            | linear("mlp.down_proj", f"{p}.mlp.down_proj", w, bias=False)
        )

    return (
        {"embedding": w["model.embed_tokens.weight"], "head": w["lm_head.weight"]}
        | stacked("layers", c.num_layers, layer)
        | norm("norm", "model.norm", w, bias=False)
    )
