"""The quantizer trains alike on any mesh."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.micro import environment
from tests.helpers.proofs import HANG

SCRIPT = Path(__file__).parents[1] / "helpers" / "multidevice" / "quantizer.py"


def test_codebooks_on_eight_devices_equal_one(tmp_path):
    """After 20 steps to 1e-5; codes that another device uses are not placed anew. Masks of the same key are equal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment(tmp_path / "xla", 8, quick=True),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    numbers = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()}
    assert numbers["largest"][0] <= 1e-5
    assert min(numbers["used"]) >= 0.9
    difference, seen = numbers["masks"]
    assert difference == 0
    assert 0.3 < seen < 0.9
