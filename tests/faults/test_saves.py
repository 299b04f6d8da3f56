"""Saves that are interrupted, and saves of gigabytes on two hosts. Slow."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.faults.uninterrupted import committed, last_step, leftovers, resumed_from
from tests.helpers.micro import read_metrics, wait_until
from tests.helpers.proofs import HANG, sized

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "checkpoints.py"


def test_sigterm_during_a_save_loses_nothing(quick_pretrain, tmp_path):
    """The save under way is finished, the last step is saved too, and nothing else is waited for."""
    workdir = tmp_path / "run"
    with quick_pretrain.start(workdir, "train.steps=100000", "checkpoint.every=1") as process:
        saving = lambda: bool(committed(workdir)) and any("tmp" in name for name in leftovers(workdir))  # noqa: E731
        assert wait_until(process, saving)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    print(f"out after {time.monotonic() - told:.1f} s")
    last = last_step(workdir)
    assert committed(workdir)[-1] == last
    assert leftovers(workdir) == []
    # How long the saves took is told by the lines of later steps.
    told_of = [row for row in read_metrics(workdir) if "checkpoint_s" in row]
    assert told_of
    assert all(row["checkpoint_bytes"] > 0 and row["checkpoint_gb_per_s"] > 0 for row in told_of)
    assert f"stopped by SIGTERM: step {last} is saved" in " ".join(out.split())
    again = quick_pretrain(workdir, f"train.steps={last + 1}", "checkpoint.every=1")
    assert resumed_from(again.stdout) == last


def test_two_hosts_read_nothing_back_while_saving_and_restore_each_byte_once(tmp_path):
    size = sized(0.5, 4.0)
    command = [sys.executable, str(BENCHMARK), "--json", "--gigabytes", str(size), "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["read back while saving"]["ok"], done.stdout + done.stderr
    assert rows["read to restore"]["ok"], done.stdout
