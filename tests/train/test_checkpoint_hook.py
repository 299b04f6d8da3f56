"""When a run saves: at its steps, and again soon where a save failed."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import CheckpointConfig, RunConfig, tiny
from baichuan_omni_jax.errors import RunStoppedError
from baichuan_omni_jax.train import checkpoint_hook
from baichuan_omni_jax.train.alerts import AlertLog
from baichuan_omni_jax.train.checkpoint_hook import CheckpointHook
from baichuan_omni_jax.train.hooks import RunProgress
from baichuan_omni_jax.train.input import DocumentFailures
from baichuan_omni_jax.train.state import StepSpec, TrainState


def bare(kind: type, **fields: object) -> Any:
    """An object of that type with these fields and nothing else."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


class FailingWorkdir(Workdir):
    """The first `failures` saves that it is given fail, at once; it may be tried until `limit` have."""

    def __init__(self, failures: int, limit: int = 3) -> None:
        self.left, self.limit, self.failed, self.saved, self.now = failures, limit, 0, [], 0.0
        self.pending = self.busy = False

    def save(self, step: int, *_: object, **__: object) -> None:
        self.pending = self.left > 0
        self.left, self.failed = self.left - 1, self.failed + self.pending
        self.saved += [] if self.pending else [step]

    def wait(self) -> None:
        if self.pending:
            raise RunStoppedError("saving failed")

    def is_saving(self) -> bool:
        return self.busy

    def save_failed(self) -> bool:
        return self.pending

    def may_retry(self) -> bool:
        return self.failed < self.limit

    def retry_at(self) -> float:
        return self.now


@pytest.fixture
def make_hook(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint_hook, "to_checkpoint", lambda *_: ({}, {}))
    run = RunConfig(name="a", checkpoint=CheckpointConfig(every=10))
    spec = bare(StepSpec, task=SimpleNamespace(run=run))
    failures = bare(DocumentFailures, share_among_hosts=lambda: None)

    def make(workdir: FailingWorkdir) -> tuple[CheckpointHook, list[int]]:
        copied = []
        hook = CheckpointHook(
            spec,
            tiny(),
            workdir,
            {},
            trained_before={},
            failures=failures,
            tokenizer_json="",
            saved_step=0,
            before_save=lambda: copied.append(len(workdir.saved)),
            alerts=AlertLog(tmp_path),
        )
        return hook, copied

    return make


def progress(step: int) -> RunProgress:
    return RunProgress(step, TrainState(step, {}, {}), {})


def test_a_save_that_failed_is_due_again_after_a_pause(make_hook):
    workdir = FailingWorkdir(failures=1)
    hook, copied = make_hook(workdir)
    assert [step for step in range(1, 21) if hook.is_due(step)] == [10, 20]
    hook.act(progress(10))
    workdir.now = float("inf")
    assert not hook.is_due(11)
    workdir.now = 0.0
    assert hook.is_due(12)
    hook.act(progress(12))
    assert workdir.saved == [12]
    assert not hook.is_due(13)
    # What a resumed run wants to find is copied before each save.
    assert copied == [0, 0]


def test_the_last_step_is_tried_until_it_is_saved(make_hook):
    workdir = FailingWorkdir(failures=2)
    hook, _ = make_hook(workdir)
    hook.finish(progress(15))
    assert workdir.saved == [15]


def test_too_many_failures_end_the_run(make_hook):
    workdir = FailingWorkdir(failures=9)
    hook, _ = make_hook(workdir)
    with pytest.raises(RunStoppedError):
        hook.finish(progress(15))
    assert workdir.failed == 3


def test_a_save_that_takes_longer_than_its_interval_is_told(make_hook, tmp_path):
    workdir = FailingWorkdir(failures=0)
    hook, _ = make_hook(workdir)
    hook.act(progress(10))
    workdir.busy = True
    hook.act(progress(20))
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert json.loads(line)["kind"] == "slow_save"
    assert "the save of step 10 is still under way" in line
