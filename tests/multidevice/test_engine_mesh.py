"""The generating engine answers alike on any mesh."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.micro import environment
from tests.helpers.proofs import HANG

SCRIPT = Path(__file__).parents[1] / "helpers" / "multidevice" / "engine.py"


@pytest.mark.slow
def test_answers_on_meshes_are_those_of_one_device(tmp_path):
    """Text, pictures, sound and speech, greedy and drawn: the same tokens and codes."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment(tmp_path / "xla", 8, quick=True),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "data2_tensor2", "equal", "data2_fsdp2_tensor2"]
