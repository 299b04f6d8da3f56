"""Weights between the released PyTorch checkpoint and ours: tables of rules, and what reads and writes by them.

`branch_rules` are the tables, `load_branch_from_safetensors` fills a module by one, `convert_to_jax` and
`convert_to_torch` move whole checkpoints, `convert_from_parts` and `convert_to_part` those of public models.
docs/how-to/weights.md is the user's view.
"""

from baichuan_omni_jax.convert.from_parts import convert_from_parts, plan_from_parts
from baichuan_omni_jax.convert.parts import PublicParts
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.safetensors_io import SafetensorsFile, open_weights
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.convert.to_jax import convert_to_jax, load_branch_from_safetensors, open_vocoder, plan_to_jax
from baichuan_omni_jax.convert.to_parts import convert_to_part, plan_to_part
from baichuan_omni_jax.convert.to_torch import convert_to_torch, open_source, plan_to_torch

__all__ = [
    "PublicParts",
    "Rule",
    "SafetensorsFile",
    "branch_rules",
    "convert_from_parts",
    "convert_to_jax",
    "convert_to_part",
    "convert_to_torch",
    "load_branch_from_safetensors",
    "open_source",
    "open_vocoder",
    "open_weights",
    "plan_from_parts",
    "plan_to_jax",
    "plan_to_part",
    "plan_to_torch",
]
