"""Steps that are not finite: counted, their batches kept, too many in a row end the run with everything saved.

Alerts: what is told of a step's numbers, and which step is kept when a run diverges.
"""

import json
import math

import numpy as np
import pytest

from baichuan_omni_jax.config import WatchConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.alerts import AlertKind, AlertLog, NonfiniteGuard, StepAlerts, keep_good_step

BATCH = {
    "tokens": np.arange(8, dtype=np.int32).reshape(1, 8),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 3, 0, 0]], np.int32),
    "source_ids": np.array([[0, 0, 0, 1, 1, 0, -1, -1]], np.int32),
    "document_ids": np.array([[7, 7, 7, 2, 2, 9, -1, -1]], np.int32),
}
BAD, GOOD = {"nonfinite": 1.0, "loss": float("nan")}, {"nonfinite": 0.0, "loss": 1.0}


@pytest.fixture
def guard(tmp_path):
    return NonfiniteGuard(tmp_path, 3, lambda source, number: f"{'ab'[source]}.jsonl:{number}")


def test_a_batch_is_kept_with_the_lines_of_its_documents(guard, tmp_path):
    guard.observe(4, GOOD, BATCH)
    assert not (tmp_path / "nonfinite").exists()
    guard.observe(5, BAD, BATCH)
    folder = tmp_path / "nonfinite" / "step_5"
    with np.load(folder / "host_0.npz") as found:
        assert {name: found[name].tolist() for name in found} == {name: x.tolist() for name, x in BATCH.items()}
    kept = json.loads((folder / "host_0.json").read_text())
    assert kept == {
        "numbers": {"nonfinite": "1.0", "loss": "nan"},
        "documents": ["a.jsonl:7", "a.jsonl:9", "b.jsonl:2"],
    }


def test_an_alert_that_cannot_be_written_is_in_the_log_all_the_same(tmp_path, caplog):
    (tmp_path / "alerts.jsonl").mkdir()
    AlertLog(tmp_path).tell(AlertKind.DATA_WAIT, 3, "devices waited")
    assert "alert at step 3 (data_wait): devices waited" in caplog.text
    assert "alerts.jsonl cannot be written: Is a directory" in caplog.text


def test_a_step_that_cannot_be_kept_ends_no_run():
    def refuse(before):
        raise ConfigError("kept_steps.json cannot be read")

    assert keep_good_step(refuse, 4) == "the step before it could not be kept: kept_steps.json cannot be read"


def test_only_steps_in_a_row_are_too_many(guard, tmp_path):
    """Bad steps 1 2, a good one, bad ones 4 5 6: the limit of 3 is met at step 6, and a good step 7 is too late."""
    exceeded = []
    for step, numbers in enumerate([BAD, BAD, GOOD, BAD, BAD, BAD, GOOD], 1):
        guard.observe(step, numbers, BATCH)
        exceeded.append(guard.exceeded)
    assert exceeded == [False] * 5 + [True] * 2
    assert guard.count == 5
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["step_2", "step_4", "step_5", "step_6"]
    assert "not finite in 3 steps in a row (train.nonfinite_limit)" in guard.sentence()


class Watched:
    """Steps as a run shows them to `StepAlerts`, one group `all`; `kept` are the steps before which one was kept."""

    def __init__(self, folder, saved: int | None = 1, **config):
        self.step, self.kept, self._folder = 0, [], folder
        self._rules = StepAlerts(WatchConfig(**config), AlertLog(folder), self._keep)
        self._saved = saved

    def _keep(self, before: int) -> int | None:
        self.kept.append(before)
        return self._saved

    def __call__(self, loss=2.0, norm=1.0, update=1e-3, nonfinite=0.0, idle=0.0) -> None:
        self.step += 1
        numbers = {"loss": loss, "gradient_norm": norm, "nonfinite": nonfinite, "learning_rate/all": 1e3}
        self._rules.check(self.step, numbers | {"parameter_norm/all": 1.0, "update_norm/all": update}, 1.0, idle)

    def told(self) -> list[tuple[int, str]]:
        path = self._folder / "alerts.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(line["step"], line["kind"]) for line in lines]


def ordinary(watched: Watched, rng, steps: int) -> None:
    """Losses that fall slowly and norms that vary by tenths, as those of a healthy run."""
    for step in range(steps):
        watched(loss=2.0 - step / 1000 + rng.normal(0, 0.02), norm=float(np.exp(rng.normal(0, 0.2))))


def test_a_healthy_run_is_silent(tmp_path, rng):
    watched = Watched(tmp_path)
    ordinary(watched, rng, 500)
    assert watched.told() == []


def test_spikes_are_told_once_and_keep_nothing(tmp_path, rng):
    watched = Watched(tmp_path)
    ordinary(watched, rng, 40)
    watched(loss=4.0, norm=20.0)
    watched(loss=4.0, norm=20.0)
    ordinary(watched, rng, 40)
    assert watched.told() == [(41, "loss_spike"), (41, "gradient_spike")]
    assert watched.kept == []


def test_an_update_larger_than_the_parameters_is_a_divergence(tmp_path):
    """At the second step, when there is no usual loss or norm yet."""
    watched = Watched(tmp_path)
    watched()
    watched(update=5e4)
    watched(update=5e4)
    assert watched.told() == [(2, "divergence")]
    assert watched.kept == [2]
    text = json.loads((tmp_path / "alerts.jsonl").read_text())["text"]
    assert "the update of group all is 5e+04 times its parameters (learning rate 1000); step 1 from before" in text


def test_a_gradient_that_explodes_is_a_divergence(tmp_path):
    watched = Watched(tmp_path, saved=None)
    for norm in (1.0, 2.0, 1.5, 2e18):
        watched(norm=norm)
    assert watched.told() == [(4, "divergence")]
    assert "nothing was saved before it" in (tmp_path / "alerts.jsonl").read_text()


def test_a_loss_that_stays_high_is_a_divergence_since_it_rose(tmp_path, rng):
    watched = Watched(tmp_path)
    ordinary(watched, rng, 40)
    for _ in range(8):
        watched(loss=5.0)
    assert watched.told() == [(41, "loss_spike"), (45, "divergence")]
    assert watched.kept == [41]


def test_a_run_that_looks_calm_after_a_divergence_keeps_no_spoiled_step(tmp_path):
    watched = Watched(tmp_path)
    for update in (1e-3, 9.0, 1e-3, 1e-3, 9.0):
        watched(update=update)
    assert watched.kept == [2]


def test_waits_for_rows_are_told(tmp_path):
    watched = Watched(tmp_path, data_wait=0.05)
    for _ in range(30):
        watched(idle=0.04)
    assert watched.told() == []
    for _ in range(30):
        watched(idle=0.2)
    assert [kind for _, kind in watched.told()] == ["data_wait"]


def test_a_step_that_is_not_finite_is_told(tmp_path):
    watched = Watched(tmp_path)
    watched(loss=math.nan, norm=math.nan, nonfinite=1.0)
    assert watched.told() == [(1, "nonfinite")]
