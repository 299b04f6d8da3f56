"""The tables against the modules: every tensor of the released model, and of the golden one."""

import json
import re

import pytest

from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.config import baichuan_omni_7b, from_hf
from baichuan_omni_jax.convert import branch_rules
from baichuan_omni_jax.convert.plan import plan_from_tensors
from baichuan_omni_jax.convert.rules import expand
from baichuan_omni_jax.convert.safetensors_io import DTYPES, TensorInfo
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_values
from tests.helpers.golden import golden_path

# How many there are of each numbered part in the released model.
COUNTS = {
    r"visual_model\.blocks\.(\d+)": 32,
    r"^model\.layers\.(\d+)": 28,
    r"audio_model\.layers\.(\d+)": 32,
    r"audio_decoder\.layers\.(\d+)": 8,
    r"prenet\.transformer_layers\.(\d+)": 12,
    r"mid_blocks\.(\d+)": 12,
    r"_blocks\.\d+\.1\.(\d+)": 4,
    r"^audio_head\.transformer_layers\.(\d+)": 3,
}
# Released shapes of tensors that are cut, turned or joined, and of both ends of every branch.
SHAPES = {
    "model.visual_model.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
    "model.visual_model.blocks.31.attn.qkv.weight": (3840, 1280),
    "model.visual_bridge_model.mlp.0.weight": (5120, 5120),
    "model.visual_bridge_model.mlp.2.weight": (3584, 5120),
    "model.embed_tokens.weight": (152064, 3584),
    "model.layers.27.self_attn.W_pack.weight": (4608, 3584),
    "model.layers.27.self_attn.W_pack.bias": (4608,),
    "model.layers.0.mlp.down_proj.weight": (3584, 18944),
    "model.audio_embed_layers.0.weight": (8193, 3584),
    "audio_head.transformer_layers.2.linear1.weight": (7168, 28672),
    "audio_head.transformer_layers.2.linear2.weight": (3584, 57344),
    "audio_head.heads.7.weight": (1025, 3584),
    "audio_tokenizer.audio_model.conv1.weight": (1280, 128, 3),
    "audio_tokenizer.audio_bridge_model.gate_proj.weight": (5120, 1280, 4),
    "audio_tokenizer.audio_bridge_model.vq_list.0.codebook.embed": (8192, 5120),
    "audio_tokenizer.audio_bridge_model.proj_decoder.weight": (1280, 5120),
    "audio_tokenizer.audio_decoder.dconv2.conv.weight": (1280, 80, 3),
    "audio_tokenizer.audio_decoder.post_net.layers.12.weight": (80, 256, 1),
    "audio_tokenizer.audio_flow_matching_decoder.prenet.out_proj.weight": (80, 512),
    "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder.mid_blocks.11.1.3.attn1.to_q.weight": (512, 256),
    "audio_tokenizer.audio_flow_matching_decoder.conditional_decoder.up_blocks.0.0.res_conv.weight": (256, 512, 1),
}


def released_names(names: list[str]) -> set[str]:
    """The names of a small model with every part numbered as far as the released one's."""
    for pattern, count in COUNTS.items():
        grown = set()
        for name in names:
            match = re.search(pattern, name)
            copies = range(count) if match else [None]
            grown |= {name if i is None else f"{name[: match.start(1)]}{i}{name[match.end(1) :]}" for i in copies}
        names = sorted(grown)
    return set(names)


def test_the_released_names_are_covered_exactly() -> None:
    small = json.loads(golden_path("omni_a/shapes.json").read_text())
    cfg = baichuan_omni_7b()
    tables, abstract = branch_rules(cfg), abstract_branches(cfg)
    ours = {}
    for branch, rules in tables.items():
        shapes = {name: value.shape for name, value in named_values(abstract[branch]).items()}
        entries, problems = expand(rules, shapes, branch)
        assert not problems
        ours |= {entry.name: entry.shape for entry in entries}
        ours |= {rule.tensor: rule.restore().shape for rule in rules if rule.restore}
    assert set(ours) == released_names(list(small))
    assert {name: ours[name] for name in SHAPES} == SHAPES
    # Names and shapes as a file's header would give them pass the engine, and one name fewer does not.
    found = {name: TensorInfo(shape, DTYPES["BF16"]) for name, shape in ours.items()}
    assert len(plan_from_tensors(found, tables, abstract, "released").tensors) == len(found)
    found.pop("lm_head.weight")
    with pytest.raises(ConfigError, match=r"1 problem: tensor lm_head.weight \[152064, 3584\] is missing"):
        plan_from_tensors(found, tables, abstract, "released")


def test_every_golden_shape() -> None:
    cfg = from_hf(json.loads(golden_path("omni_a/config.json").read_text()))
    abstract, ours = abstract_branches(cfg), {}
    for branch, rules in branch_rules(cfg).items():
        shapes = {name: value.shape for name, value in named_values(abstract[branch]).items()}
        ours |= {entry.name: list(entry.shape) for entry in expand(rules, shapes, branch)[0]}
        ours |= {rule.tensor: list(rule.restore().shape) for rule in rules if rule.restore}
    assert ours == json.loads(golden_path("omni_a/shapes.json").read_text())
