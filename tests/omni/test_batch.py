"""The one list of the batch's fields: importable without jax, complete, and the same for all who lay out a batch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import Budgets, tiny
from baichuan_omni_jax.omni.batch import FIELDS, BatchSizes, abstract_batch, empty_batch
from baichuan_omni_jax.sharding import ShardingRules
from data_pipelines.packing.batch import empty_rows
from tests.helpers.micro import one_device

BUDGETS = Budgets(tokens=64, patches=32, audio_frames=24, audio_targets=16, mel_windows=3, items=9)


@pytest.mark.parametrize("module", ["baichuan_omni_jax.omni.batch", "data_pipelines.packing.batch"])
def test_those_who_lay_out_rows_need_no_jax(module):
    code = f"import {module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_field_is_read_by_one_branch():
    named = [name for branch in BRANCHES.values() for name in branch.batch_fields]
    assert sorted(named) == sorted(FIELDS)


def test_the_reference_describes_every_field():
    page = Path(__file__).parents[2] / "docs/reference/batch.md"
    rows = [line.split("|")[1] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert set(FIELDS) <= set(re.findall(r"`(\w+)`", " ".join(rows)))


def test_packed_rows_are_what_a_step_is_compiled_for():
    omni = tiny()
    branches = [branch.name for branch in BRANCHES.values()]
    abstract = abstract_batch(2, BUDGETS, omni, branches, one_device(), ShardingRules(), mel_frames=40)
    packed = empty_rows(2, BUDGETS, omni, mel_frames=40)
    assert {name: (array.shape, array.dtype) for name, array in packed.items()} == {
        name: (array.shape, array.dtype) for name, array in abstract.items()
    }


def test_unused_slots_point_one_past_what_they_index():
    sizes = BatchSizes(tokens=64, audio_frames=24, audio_targets=16, mel_windows=3, visual_tokens=8)
    indexes = ("audio_index", "audio_target_index", "visual_index")
    for name, array in empty_batch((*indexes, "mel_audio"), 2, sizes).items():
        assert np.unique(array).tolist() == [24 if name == "mel_audio" else 64]
