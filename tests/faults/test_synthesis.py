"""A synthesis job killed again and again ends with the files of one that was never stopped."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from tests.helpers.proofs import HANG, sized, wait_for

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS, UNIT = sized(40, 80), 4  # ten or twenty units
KILLS = sized(4, 10)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(manifest: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "data_pipelines.synthesis", "itts", str(manifest), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        [*command, "--workers", "2", "--unit", str(UNIT)],
        cwd=ROOT,
        start_new_session=True,
        env=dict(os.environ),
        **quiet,
    )


def group_lives(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def count_units(out: Path) -> int:
    """How many units are finished."""
    return len(list((out / ".units").glob("*.json")))


@pytest.mark.slow
def test_killed_jobs_end_with_the_same_files(sample_dir, tmp_path):
    manifest = tmp_path / "text.jsonl"
    with (sample_dir / "text.jsonl").open(encoding="utf-8") as lines:
        manifest.write_text("".join(islice(lines, DOCUMENTS)), encoding="utf-8")
    assert start(manifest, tmp_path / "whole").wait(timeout=HANG) == 0
    rng, out, units = random.Random(0), tmp_path / "killed", []
    for _ in range(KILLS):
        before, process = count_units(out), start(manifest, out)
        # Somewhere behind the next finished unit, however long that takes here.
        wait_for(lambda process=process, before=before: count_units(out) > before or process.poll() is not None)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        assert process.wait(timeout=HANG) in (-signal.SIGKILL, 0)
        # Its workers, and the eSpeak processes of theirs, end by themselves.
        wait_for(lambda process=process: not group_lives(process), "the end of a killed job's processes")
        units.append(count_units(out))
    assert units == sorted(units), "finished units were lost"
    assert any(0 < done < DOCUMENTS // UNIT for done in units), f"no kill in the middle: {units}"
    assert start(manifest, out).wait(timeout=HANG) == 0
    assert digests(out) == digests(tmp_path / "whole")
