"""The language model decodes alike on any mesh."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.micro import environment
from tests.helpers.proofs import HANG

SCRIPT = Path(__file__).parents[1] / "helpers" / "multidevice" / "decode.py"


@pytest.mark.slow
def test_logits_on_eight_devices_equal_one(tmp_path):
    """Rows split over four devices, heads over two: to 1e-5; int8, whose roundings may differ, to 1e-2."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment(tmp_path / "xla", 8, quick=True),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    far = {name: float(number) for name, number in map(str.split, done.stdout.splitlines())}
    assert far["float32"] < 1e-5
    assert far["int8"] < 1e-2
