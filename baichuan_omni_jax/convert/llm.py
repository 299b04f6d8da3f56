"""`model.embed_tokens`, `model.layers.*`, `model.norm`, `lm_head` <-> the branch `llm`."""

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import into_heads, linear, norm, out_of_heads, packed_heads
from baichuan_omni_jax.convert.rules import Rule

LAYER = "model.layers.{layer}"


def llm_rules(cfg: OmniConfig) -> list[Rule]:
    """Q, K and V lie in one `W_pack`, or with `qkv_pack` off (Qwen2.5's own names) in three projections."""
    attention = f"{LAYER}.self_attn"
    if cfg.llm.qkv_pack:
        qkv = packed_heads(f"{attention}.W_pack.weight", f"{attention}.W_pack.bias", "layers.attention")
    else:
        qkv = [rule for w in "qkv" for rule in into_heads(f"{attention}.{w}_proj", f"layers.attention.{w}_proj")]
    return [
        Rule("model.embed_tokens.weight", "embedding"),
        *norm(f"{LAYER}.input_layernorm", "layers.attention_norm", bias=False),
        *qkv,
        *out_of_heads(f"{attention}.o_proj", "layers.attention.o_proj", bias=False),
        *norm(f"{LAYER}.post_attention_layernorm", "layers.mlp_norm", bias=False),
        *linear(f"{LAYER}.mlp.gate_proj", "layers.mlp.gate_proj", bias=False),
        *linear(f"{LAYER}.mlp.up_proj", "layers.mlp.up_proj", bias=False),
        *linear(f"{LAYER}.mlp.down_proj", "layers.mlp.down_proj", bias=False),
        *norm("model.norm", "norm", bias=False),
        Rule("lm_head.weight", "head"),
    ]
