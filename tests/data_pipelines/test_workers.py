"""Data workers end with their reader: when it stops early, when one of them fails, when one of them dies."""

import multiprocessing
import os
import signal
import threading

import pytest

from tests.data_pipelines.conftest import with_config


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
    next(steps)
    steps.close()


def test_an_error_in_a_worker_is_raised_and_leaves_nothing(sample_pipeline, nothing_left):
    """An error that is no SampleError is a bug or a broken disk: it ends the run, with its own message."""
    with pytest.raises(RuntimeError, match="the store broke down"):
        list(with_config(sample_pipeline, workers=1).steps(Failing(), epochs=1))


def test_a_worker_that_dies_is_told_and_leaves_nothing(sample_pipeline, nothing_left):
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        list(with_config(sample_pipeline, workers=1).steps(Failing(dies=True), epochs=1))
