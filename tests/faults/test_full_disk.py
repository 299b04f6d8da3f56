"""A disk that is full when a checkpoint is to be written."""

import re
import resource
from pathlib import Path

import pytest

from baichuan_omni_jax.checkpoint.workdir import TRIES
from tests.helpers.faults.uninterrupted import EVERY, STEPS, assert_same_run, committed, leftovers, resumed_from
from tests.helpers.micro import wait_until
from tests.helpers.proofs import HANG

pytestmark = pytest.mark.slow

# Bytes of a file: more than the numbers of a run, less than the parameters of a branch.
LIMIT = 100_000


@pytest.fixture
def full(pretrain, tmp_path) -> tuple[Path, int, str]:
    """A run whose files may not grow any more after its first checkpoint: workdir, exit code, stderr."""
    workdir = tmp_path / "run"
    with pretrain.start(workdir, f"train.steps={STEPS}") as process:
        assert wait_until(process, lambda: bool(committed(workdir)))
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        _, err = process.communicate(timeout=HANG)
    return workdir, process.returncode, err


def test_full_disk_ends_the_run_with_one_sentence_and_costs_nothing_that_was_saved(full, pretrain, finished):
    workdir, code, err = full
    saved = committed(workdir)
    assert code == 3, err
    # Orbax and asyncio tell of every write that failed, with tracebacks; the run has the last word.
    assert re.match(rf"error: saving step \d+ in {workdir} failed: .*File too large", err.splitlines()[-1])
    # It was told when it happened, and later steps were tried in vain.
    assert f"saving step {saved[-1] + EVERY} in {workdir} failed: " in err
    assert f"({TRIES} in a row)" in err
    assert leftovers(workdir) == []
    # There is room again.
    end = pretrain(workdir, f"train.steps={STEPS}")
    assert end.returncode == 0, end.stderr
    assert resumed_from(end.stdout) == saved[-1]
    assert_same_run(workdir, finished)
