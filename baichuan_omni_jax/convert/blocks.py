"""Rows that several tables share. Torch linears are (out, in), ours (in, out), heads an axis of their own."""

from baichuan_omni_jax.convert.rules import Rule


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """`weight` (out, in) <-> (in, out), and `bias`."""
    return [Rule(f"{theirs}.weight", f"{ours}.weight", "o i -> i o"), *_bias(theirs, ours, bias)]


def into_heads(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """A Q, K or V projection: `weight` (heads * head_dim, d) <-> (d, heads, head_dim), and `bias`."""
    weight = Rule(f"{theirs}.weight", f"{ours}.weight", "(n h) d -> d n h")
    return [weight, *([Rule(f"{theirs}.bias", f"{ours}.bias", "(n h) -> n h")] if bias else [])]


def out_of_heads(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """An attention output: `weight` (d, heads * head_dim) <-> (heads, head_dim, d), and `bias`."""
    return [Rule(f"{theirs}.weight", f"{ours}.weight", "d (n h) -> n h d"), *_bias(theirs, ours, bias)]


def packed_heads(weight: str, bias: str, ours: str) -> list[Rule]:
    """Q, K and V stacked on the output axis <-> `ours.{q,k,v}_proj`."""
    names = [f"{ours}.{which}_proj" for which in "qkv"]
    return [
        Rule(weight, tuple(f"{name}.weight" for name in names), "(n h) d -> d n h"),
        Rule(bias, tuple(f"{name}.bias" for name in names), "(n h) -> n h"),
    ]


def norm(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """`weight` <-> `scale`, and the `bias` of a LayerNorm."""
    return [Rule(f"{theirs}.weight", f"{ours}.scale"), *_bias(theirs, ours, bias)]


def conv(theirs: str, ours: str) -> list[Rule]:
    """A `Conv1d`: `weight` (out, in, kernel) <-> `linear.weight` (kernel, in, out), and the bias."""
    return [
        Rule(f"{theirs}.weight", f"{ours}.linear.weight", "o i k -> k i o"),
        Rule(f"{theirs}.bias", f"{ours}.linear.bias"),
    ]


def upsample_block(theirs: str, ours: str) -> list[Rule]:
    """A transposed convolution, `weight` (in, out, kernel) <-> (kernel, in, out), and its GroupNorm."""
    return [
        Rule(f"{theirs}.conv.weight", f"{ours}.conv.weight", "i o k -> k i o"),
        Rule(f"{theirs}.conv.bias", f"{ours}.conv.bias"),
        *norm(f"{theirs}.norm", f"{ours}.norm"),
    ]


def whisper_layer(theirs: str, ours: str, *, norm_bias: bool = True) -> list[Rule]:
    """A Whisper layer <-> `nn.encoder.EncoderLayer`; K has no bias, RMSNorms have none either."""
    return [
        *norm(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm", bias=norm_bias),
        *into_heads(f"{theirs}.self_attn.q_proj", f"{ours}.attention.q_proj"),
        *into_heads(f"{theirs}.self_attn.k_proj", f"{ours}.attention.k_proj", bias=False),
        *into_heads(f"{theirs}.self_attn.v_proj", f"{ours}.attention.v_proj"),
        *out_of_heads(f"{theirs}.self_attn.out_proj", f"{ours}.attention.o_proj"),
        *norm(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm", bias=norm_bias),
        *linear(f"{theirs}.fc1", f"{ours}.mlp.fc1"),
        *linear(f"{theirs}.fc2", f"{ours}.mlp.fc2"),
    ]


def _bias(theirs: str, ours: str, wanted: bool) -> list[Rule]:
    return [Rule(f"{theirs}.bias", f"{ours}.bias")] if wanted else []
