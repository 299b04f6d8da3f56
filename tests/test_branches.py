"""The table of branches: it agrees with the configuration and with itself, and reading it needs no jax."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import jax
import pytest

from baichuan_omni_jax.branches import (
    AUDIO_TOKENIZER_BRANCHES,
    BRANCH_NAMES,
    BRANCHES,
    FLOW_MATCHING_BRANCHES,
    OMNI_BRANCHES,
    SPEECH_BRANCHES,
)
from baichuan_omni_jax.checkpoint import abstract_branches
from baichuan_omni_jax.config import MeshConfig, OmniConfig, tiny
from baichuan_omni_jax.config.vocoder import tiny_vocoder
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[1]


def test_reading_the_table_imports_no_jax():
    code = "import sys, baichuan_omni_jax.branches; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_every_name_has_one_row():
    assert tuple(BRANCHES) == BRANCH_NAMES


def test_every_section_of_the_model_is_decided_by_one_branch():
    decided = [section for branch in BRANCHES.values() for section in branch.sections]
    assert sorted(decided) == sorted(field.name for field in fields(OmniConfig))


@pytest.mark.parametrize("names", [OMNI_BRANCHES, AUDIO_TOKENIZER_BRANCHES, FLOW_MATCHING_BRANCHES, SPEECH_BRANCHES])
def test_what_a_branch_requires_is_in_every_list_that_names_it(names):
    assert all(set(BRANCHES[name].requires) <= set(names) for name in names)


def test_what_makes_codes_or_sound_is_computed_as_in_training():
    """Speech must not depend on the dtype that an answer's text is computed in."""
    assert all(BRANCHES[name].dtype == "float32" for name in (*SPEECH_BRANCHES, "vocoder"))


def test_each_branch_is_built_from_its_row_and_patterns_find_its_parameters():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        modules = abstract_branches(tiny(), tiny_vocoder(), only=BRANCH_NAMES)
    parameters = {f"{name}.{leaf}" for name, module in modules.items() for leaf in named_values(module)}
    for branch in BRANCHES.values():
        own = {name for name in parameters if re.match(branch.pattern(), name)}
        assert own
        assert own == {name for name in parameters if name.startswith(branch.path())}
        assert type(modules[branch.name]).__name__ == branch.module.partition(":")[2]
        if branch.stream is not None:
            assert any(name.startswith(branch.path() + branch.stream) for name in own)
