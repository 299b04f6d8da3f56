"""What a run that was interrupted must be like in the end, and what it left behind when it was."""

import re
from pathlib import Path

import numpy as np

from tests.helpers.micro import STEPS, numbers, read_metrics, saved_arrays

EVERY = 2  # checkpoint.every of configs/micro.py, which keeps three


def assert_same_run(workdir: Path, finished: Path, step: int = STEPS) -> None:
    """The numbers of every step, and of the last the parameters, the optimizer's state and the data's, bit for bit."""
    assert numbers(workdir) == numbers(finished)
    here, there = (path / "checkpoints" / str(step) / "data.json" for path in (workdir, finished))
    assert here.read_text() == there.read_text()
    arrays, expected = saved_arrays(workdir, step), saved_arrays(finished, step)
    assert arrays.keys() == expected.keys()
    assert [name for name in expected if not same_bits(arrays[name], expected[name])] == []
    assert leftovers(workdir) == []


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


def committed(workdir: Path) -> list[int]:
    """Steps whose checkpoint is whole, ascending."""
    folders = [path for path in _entries(workdir) if path.name.isdigit() and (path / "checksums.json").exists()]
    return sorted(int(path.name) for path in folders)


def leftovers(workdir: Path) -> list[str]:
    """What stands among the checkpoints and is none: half-written, or half-removed."""
    whole = {str(step) for step in committed(workdir)}
    return sorted(path.name for path in _entries(workdir) if path.name not in whole)


def last_step(workdir: Path) -> int:
    """Of metrics.jsonl; 0 where there is none."""
    return max((row["step"] for row in read_metrics(workdir)), default=0)


def resumed_from(stdout: str) -> int:
    """The step that a start went on from; 0 where it began."""
    found = re.search(r"resumed from step (\d+)", " ".join(stdout.split()))
    return int(found[1]) if found else 0


def _entries(workdir: Path) -> list[Path]:
    folder = workdir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []
