"""`model.visual_model.*` and `model.visual_bridge_model.*` <-> the branch `vision`."""

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.blocks import linear, norm, out_of_heads, packed_heads
from baichuan_omni_jax.convert.rules import Rule

TOWER, BRIDGE = "model.visual_model", "model.visual_bridge_model"
BLOCK, LAYER = f"{TOWER}.blocks.{{layer}}", "tower.layers"


def vision_rules(cfg: OmniConfig) -> list[Rule]:
    """The patch embedding is a convolution over (temporal, row, column) there, a matrix for each time here."""
    area = (("c", cfg.vision.in_channels), ("y", cfg.vision.patch_size), ("x", cfg.vision.patch_size))
    patches = f"{TOWER}.patch_embed.proj.weight"
    return [
        Rule(patches, "tower.patch_embedding.kernel", "d c t y x -> t (c y x) d", area),
        *norm(f"{BLOCK}.norm1", f"{LAYER}.attention_norm"),
        *packed_heads(f"{BLOCK}.attn.qkv.weight", f"{BLOCK}.attn.qkv.bias", f"{LAYER}.attention"),
        *out_of_heads(f"{BLOCK}.attn.proj", f"{LAYER}.attention.o_proj"),
        *norm(f"{BLOCK}.norm2", f"{LAYER}.mlp_norm"),
        *linear(f"{BLOCK}.mlp.fc1", f"{LAYER}.mlp.fc1"),
        *linear(f"{BLOCK}.mlp.fc2", f"{LAYER}.mlp.fc2"),
        *norm(f"{BRIDGE}.ln_q", "projector.norm"),
        # Four neighbouring patches, one after the other on the input axis.
        Rule(f"{BRIDGE}.mlp.0.weight", "projector.fc1.weight", "f (g d) -> g d f"),
        Rule(f"{BRIDGE}.mlp.0.bias", "projector.fc1.bias"),
        *linear(f"{BRIDGE}.mlp.2", "projector.fc2"),
    ]
