"""What every branch computes does not depend on the mesh."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.proofs import HANG

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_branches_on_eight_devices_equal_one_device():
    """Outputs and gradients of vision, audio encoder, audio head and language model: fsdp 2 x context 2 x tensor 2."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "tests" / "helpers" / "multidevice" / "branches.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference") == 4, done.stdout
