"""A run saved on four devices goes on with two and with eight: the same documents in the same order, equal losses."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.faults.uninterrupted import committed, resumed_from
from tests.helpers.micro import Command, read_metrics
from tests.helpers.proofs import sized

pytestmark = pytest.mark.slow

SAVED, STEPS = 3, 6
# Eight parts of 64 patches, the largest picture, and blocks of tokens for four context shards: for every mesh here.
SETTINGS = ("data.media_shards=8", "data.budgets.patches=512", "data.context_block=32", "compute.attention_block=64")
MESHES = {
    2: ("mesh.fsdp=2",),
    4: ("mesh.fsdp=2", "mesh.context=2"),
    8: ("mesh.data=2", "mesh.context=2", "mesh.tensor=2"),
}
# Relative, fp32: sums are taken in another order.
TOLERANCE = 1e-4
LOSSES = ("loss", "loss_text", "loss_audio", "gradient_norm")
EQUAL = ("tokens", "fill_tokens", "fill_patches", "fill_audio", "flops_llm", "flops_vision", "flops_audio")


@pytest.fixture(scope="module")
def train(micro_root, tmp_path_factory):
    """Trains a workdir up to a step on some devices. Compiled with few optimizations, which is most of the time."""
    recorded = Path(__file__).parents[1] / "helpers" / "faults" / "recorded.py"
    command = Command(micro_root, tmp_path_factory.mktemp("xla"), recorded, quick=True)

    def run(workdir: Path, steps: int, devices: int) -> str:
        done = command(workdir, *SETTINGS, *MESHES[devices], f"train.steps={steps}", devices=devices)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """All steps on four devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(workdir, STEPS, 4)
    return workdir


@pytest.fixture(scope="module")
def part(train, whole, tmp_path_factory) -> Path:
    """The first steps on four devices."""
    workdir = tmp_path_factory.mktemp("part") / "run"
    train(workdir, SAVED, 4)
    assert committed(workdir)[-1] == SAVED
    return workdir


@pytest.fixture(scope="module", params=sized((8,), (2, 8)), ids="{} devices".format)
def continued(request, train, part, tmp_path_factory) -> Path:
    """The first steps on four devices, the rest on others."""
    workdir = shutil.copytree(part, tmp_path_factory.mktemp("continued") / "run")
    assert resumed_from(train(workdir, STEPS, request.param)) == SAVED
    return workdir


def test_losses_on_other_devices(continued, whole):
    rows, expected = read_metrics(continued), read_metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, STEPS + 1))
    # A step may hold no speech to predict: its audio loss is 0.
    differences = [
        abs(row[key] - other[key]) / max(other[key], 1e-9)
        for row, other in zip(rows, expected, strict=True)
        for key in LOSSES
    ]
    print(f"largest relative difference {max(differences):.1e}")
    assert max(differences) <= TOLERANCE
    for row, other in zip(rows, expected, strict=True):
        assert {key: row[key] for key in EQUAL} == {key: other[key] for key in EQUAL}


def test_rows_of_the_same_documents_on_other_devices(continued, whole):
    found, expected = documents(continued), documents(whole)
    assert len(expected) == STEPS
    assert all(row for step in expected for row in step)
    assert found == expected
    assert data_state(continued) == data_state(whole)


def documents(workdir: Path) -> list:
    return [json.loads(line) for line in (workdir / "documents.jsonl").read_text().splitlines()]


def data_state(workdir: Path) -> dict:
    return json.loads((workdir / "checkpoints" / str(STEPS) / "data.json").read_text())
