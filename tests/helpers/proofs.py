"""How much the long tests do, how long a process may take, and what the test processes share.

CI runs some of the long tests and `pytest -m slow` all of them, at a small size. `benchmarks/long_tests.py` runs them
at the full size: hundreds of kills, thousands of damaged files, every shape of every kernel, whole chains of trainings.
"""

import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

FULL = os.environ.get("PROOFS") == "full"
# Seconds. What has not ended by then hangs: no machine is that slow, however busy.
HANG = 3600.0


def sized(small: T, full: T) -> T:
    """`full` under `PROOFS=full`, else `small`."""
    return full if FULL else small


def wait_for(condition: Callable[[], T], what: str = "the condition", process: subprocess.Popen | None = None) -> T:
    """What the condition gives once that is true of it.

    Fails, naming `what` was waited for, where a process hangs, and at once where `process` ends before.
    """
    end = time.monotonic() + HANG
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {HANG:.0f} s for {what}"
        assert process is None or process.poll() is None, f"the process ended before {what}"
        time.sleep(0.01)
    return found


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """The path `name` that `build` fills: once for all processes of a parallel run, which wait."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path, done = folder / name, folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            build(path)
            done.touch()
    return path
