"""Data workers end with their reader: when it stops early, when one of them fails, when one of them dies."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, RunConfig
from baichuan_omni_jax.config.overrides import apply_overrides, from_dict, to_dict
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.rows import free_shared_memory, worker_count
from tests.data_pipelines.conftest import with_config
from tests.data_pipelines.datasets.test_jobs import alive, wait_for

REPOSITORY = Path(__file__).resolve().parents[3]
KILLED = """
import multiprocessing, pickle, time
from data_pipelines.pipeline import open_pipeline
if __name__ == "__main__":
    with open("config", "rb") as file:
        steps = open_pipeline(*pickle.load(file)).steps(None)
    next(steps)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(100)
"""


class Failing:
    """Codes whose store breaks down, or takes its process with it."""

    def __init__(self, dies: bool = False):
        self.dies = dies

    def lookup(self, key):
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the store broke down")


@pytest.fixture(scope="module")
def used_before(sample_pipeline, sample_codes):
    """Grain keeps one pool of threads for a program, which frees shared memory."""
    steps = with_config(sample_pipeline, workers=1).steps(sample_codes)
    next(steps)
    steps.close()


@pytest.fixture
def nothing_left(used_before):
    """No process and no thread more than before."""
    before = _running()
    yield
    assert _running() <= before


def _running() -> set:
    return set(threading.enumerate()) | {child.pid for child in multiprocessing.active_children()}


def test_a_reader_that_stops_early_leaves_nothing(sample_pipeline, sample_codes, nothing_left):
    steps = with_config(sample_pipeline, workers=2).steps(sample_codes)
    step = next(steps)
    steps.close()
    # An array without a number, of a budget that is 0, has no memory to share.
    shared = [Path("/dev/shm") / array.shm.name for array in step.batch.values() if array.size]
    assert all(path.exists() for path in shared)
    del step
    free_shared_memory()
    assert not any(path.exists() for path in shared)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_program(sample_pipeline, tmp_path):
    """Nothing tells them to stop: they would wait for ever until somebody takes what they decoded."""
    text = with_config(sample_pipeline, workers=2, mixture=sample_pipeline.config.mixture[:1])
    (tmp_path / "config").write_bytes(pickle.dumps((text.config, text.omni)))
    (tmp_path / "script.py").write_text(KILLED)
    command, where = [sys.executable, "script.py"], {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | where, stdout=subprocess.PIPE) as program:
        workers = [int(number) for number in program.stdout.readline().split()]
        assert len(workers) == 2
        assert all(map(alive, workers))
        program.kill()
    wait_for(lambda: not any(map(alive, workers)))


def test_an_error_in_a_worker_is_raised_and_leaves_nothing(sample_pipeline, nothing_left):
    """An error that is no SampleError is a bug or a broken disk: it ends the run, with its own message."""
    with pytest.raises(RuntimeError, match="the store broke down"):
        list(with_config(sample_pipeline, workers=1).steps(Failing(), epochs=1))


def test_a_worker_that_dies_is_told_and_leaves_nothing(sample_pipeline, nothing_left):
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        list(with_config(sample_pipeline, workers=1).steps(Failing(dies=True), epochs=1))


@pytest.mark.parametrize(("cores", "expected"), [(1, 2), (8, 2), (16, 8), (208, 64)])
def test_as_many_workers_as_the_host_has_cores_for(monkeypatch, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**26}.get)
    budgets = Budgets(tokens=65536, patches=131072, audio_frames=0, audio_targets=0)
    assert worker_count(DataConfig(budgets=budgets, rows=2)) == expected
    assert worker_count(DataConfig(budgets=budgets, workers=3)) == 3
    # 256 GiB hold the steps of few workers where a step has many rows.
    assert worker_count(DataConfig(budgets=budgets, rows=256)) == min(expected, 1)


def test_the_number_of_workers_is_a_number_or_a_word():
    run = apply_overrides(RunConfig(name="x"), ["data.workers=3"])
    assert run.data.workers == 3
    run = apply_overrides(run, ["data.workers=auto"])
    assert from_dict(RunConfig, to_dict(run)).data.workers == "auto"
    for value in ("many", "1.5", "true"):
        with pytest.raises(ConfigError, match=r"data\.workers must be int or 'auto', not"):
            apply_overrides(run, [f"data.workers={value}"])
