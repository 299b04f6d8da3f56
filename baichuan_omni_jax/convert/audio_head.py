"""`model.audio_embed_layers.*` and `audio_head.*` <-> the branch `audio_head`."""

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import linear, norm, out_of_heads, packed_heads
from baichuan_omni_jax.convert.rules import Rule

HEAD, LAYER = "audio_head", "audio_head.transformer_layers.{layer}"


def audio_head_rules(cfg: OmniConfig) -> list[Rule]:
    """The MLP of each depth is a slice of one wide matrix there. Its biases are never added; they are carried."""
    attention = f"{LAYER}.self_attention"
    return [
        Rule("model.audio_embed_layers.{q}.weight", "embedding.tables.{q}"),
        *norm(f"{LAYER}.layernorm1", "head.layers.attention_norm", bias=False),
        *packed_heads(f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", "head.layers.attention"),
        *out_of_heads(f"{attention}.out_proj", "head.layers.attention.o_proj"),
        *norm(f"{LAYER}.layernorm2", "head.layers.mlp_norm", bias=False),
        Rule(f"{LAYER}.linear1.weight", "head.layers.linear1.weight", "f (q d) -> f q d"),
        Rule(f"{LAYER}.linear1.bias", "head.layers.unused_bias1"),
        Rule(f"{LAYER}.linear2.weight", "head.layers.linear2.weight", "d (q f) -> d q f"),
        Rule(f"{LAYER}.linear2.bias", "head.layers.unused_bias2"),
        *norm(f"{HEAD}.headnorm", "head.norm", bias=False),
        *linear(f"{HEAD}.heads.{{q}}", "head.heads.{q}"),
    ]
