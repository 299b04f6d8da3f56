"""A training step's losses and gradients do not depend on the mesh."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.micro import environment, small_copy
from tests.helpers.proofs import HANG, sized

SCRIPT = Path(__file__).parents[1] / "helpers" / "multidevice" / "step.py"


@pytest.mark.slow
def test_weight_gradients_are_summed_in_fp32(tmp_path):
    """bf16 compute: each matrix of a layer against float64, and the type of every sum over devices."""
    meshes = ("2,2,2,1", "1,2,2,2")
    command = [sys.executable, str(SCRIPT.with_name("weight_gradients.py")), *meshes]
    done = subprocess.run(
        command, env=environment(tmp_path / "xla", 8), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 narrow") == len(meshes), done.stdout


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(("1,2,2,2/2",), marks=pytest.mark.slow),
        pytest.param(
            sized(("1,2,2,2/2/sqrt",), ("1,1,1,1/2/sqrt", "1,2,2,2/2/sqrt", "2,2,2,1/1/document")),
            marks=pytest.mark.slow,
        ),
        pytest.param(sized(("2,2,2,1",), ("2,2,2,1", "8,1,1,1", "1,8,1,1", "1,1,8,1")), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_losses_and_gradients_equal_one_device(meshes, sample_dir, tmp_path):
    """Real documents, spoken audio included, packed into 8 rows: fp32, to 1e-5 of each array's largest value.

    1,2,2,2/2 is in two parts. `sqrt` and `document` are compared with each document alone, weighted by hand.
    Where fsdp and context are split, also what the layers exchange over `context`.
    """
    root = small_copy(sample_dir, tmp_path / "data")
    command = [sys.executable, str(SCRIPT), str(root), str(tmp_path / "codes"), *meshes]
    done = subprocess.run(
        command, env=environment(tmp_path / "xla", 8), capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference") == len(meshes), done.stdout
