"""The training command with held-out mixtures and a trace, and with steps that are not finite. Minutes: slow."""

import json
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import Workdir
from tests.helpers.micro import STEPS, numbers, read_metrics, saved_arrays

pytestmark = pytest.mark.slow

CONFIG = """
from dataclasses import replace
from runpy import run_path

from baichuan_omni_jax.config import EvalConfig, EvalMixture, SourceConfig

SOURCES = tuple(SourceConfig(name=name, manifest=f"{name}.jsonl") for name in ("text", "audio"))


def get_config():
    mixtures = {"mixed": SOURCES, "again": SOURCES, "text": SOURCES[:1]}
    held_out = tuple(EvalMixture(name=name, sources=sources) for name, sources in mixtures.items())
    return replace(run_path(MICRO)["get_config"](), eval=EvalConfig(every=5, steps=2, mixtures=held_out))
"""


@pytest.fixture(scope="module")
def evaluated(pretrain, tmp_path_factory) -> Path:
    from tests.helpers.micro import CONFIG as MICRO

    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "config.py").write_text(f"MICRO = {str(MICRO)!r}\n{CONFIG}")
    steps = f"train.steps={STEPS}"
    done = pretrain(folder / "run", steps, "--profile=3:5", config=folder / "config.py")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_held_out_losses(evaluated):
    """Before the first step and after every fifth; the same documents give the same number each time."""
    rows = {row["step"]: row for row in read_metrics(evaluated)}
    assert list(rows) == list(range(STEPS + 1))
    assert [step for step, row in rows.items() if any(key.startswith("eval/") for key in row)] == list(
        range(0, STEPS + 1, 5)
    )
    for step in range(0, STEPS + 1, 5):
        found = {key.removeprefix("eval/"): value for key, value in rows[step].items() if key.startswith("eval/")}
        assert all(np.isfinite(value) for value in found.values())
        mixed = {key.removeprefix("mixed/"): value for key, value in found.items() if key.startswith("mixed/")}
        assert mixed == {key.removeprefix("again/"): value for key, value in found.items() if key.startswith("again/")}
        assert mixed["loss"] == pytest.approx(mixed["loss_text"] + mixed["loss_audio"], rel=1e-6)
        assert mixed["loss_audio"] == pytest.approx(np.mean([mixed[f"loss_audio_q{q}"] for q in range(8)]), rel=1e-6)
        # Sources and text alone: every document of `text` is text alone, every one of `audio` has audio.
        assert mixed["text/loss_text"] == pytest.approx(mixed["loss_text_only"], rel=1e-6)
        assert "text/loss_audio" not in mixed
        assert mixed["audio/loss_audio"] == pytest.approx(mixed["loss_audio"], rel=1e-6)
        assert found["text/loss"] == found["text/loss_text"] == pytest.approx(found["text/loss_text_only"], rel=1e-6)
    assert rows[10]["eval/mixed/loss"] < rows[0]["eval/mixed/loss"] - 0.5


def test_evaluation_does_not_disturb_training(evaluated, finished):
    rows = [{key: value for key, value in row.items() if not key.startswith("eval/")} for row in numbers(evaluated)]
    assert rows[1:] == numbers(finished)


def test_trace_has_the_model_s_names(evaluated):
    (file,) = (evaluated / "profile").rglob("*.xplane.pb")
    content = file.read_bytes()
    assert [name for name in (b"/llm/", b"audio_head", b"text_loss", b"optimizer") if name not in content] == []


def test_steps_that_are_not_finite_end_the_run(pretrain, finished, tmp_path):
    """A weight of the audio loss beyond fp32: batches kept, parameters and optimizer saved as they were drawn."""
    workdir = tmp_path / "run"
    done = pretrain(workdir, "train.audio_loss_weight=1e39", "checkpoint.every=100", "train.nonfinite_limit=2")
    assert done.returncode == 3, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: loss or gradient was not finite in 2 steps in a row (train.nonfinite_limit)")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["nonfinite_steps"] for row in rows[:2]] == [1, 2]
    assert rows[0]["loss"] is None
    assert {path.name for path in (workdir / "nonfinite").iterdir()} == {"step_1", "step_2", "step_3"}
    last = rows[-1]["step"]
    assert Workdir(workdir, keep=3).latest_step() == last
    assert f"step {last} is saved in {workdir}" in sentence
    arrays = saved_arrays(workdir, last)
    assert all(np.isfinite(value).all() for value in arrays.values())
    assert all(not value.any() for name, value in arrays.items() if name.startswith("opt_state"))


DIVERGING = """
from dataclasses import replace
from runpy import run_path

from baichuan_omni_jax.config import CheckpointConfig


def get_config():
    run = run_path(MICRO)["get_config"]()
    groups = tuple(replace(group, learning_rate=1e3) for group in run.optimizer.groups)
    return replace(
        run, optimizer=replace(run.optimizer, groups=groups), checkpoint=CheckpointConfig(every=1, keep=2)
    )
"""


def test_a_run_that_diverges_is_told_at_once_and_a_good_step_is_kept(pretrain, tmp_path):
    """A learning rate of 1e3, which the warm-up reaches at step 3; step 1 has a rate of 0."""
    from tests.helpers.micro import CONFIG as MICRO

    (tmp_path / "config.py").write_text(f"MICRO = {str(MICRO)!r}\n{DIVERGING}")
    workdir = tmp_path / "run"
    done = pretrain(workdir, "train.steps=8", config=tmp_path / "config.py")
    alerts = [json.loads(line) for line in (workdir / "alerts.jsonl").read_text().splitlines()]
    first = next(alert for alert in alerts if alert["kind"] == "divergence")
    assert first["step"] <= 5
    assert "times its parameters (learning rate 500)" in first["text"]
    assert f"alert at step {first['step']} (divergence)" in done.stderr
    (kept,) = map(int, json.loads((workdir / "kept_steps.json").read_text()))
    assert kept < first["step"]
    # Beside the two newest: the run ends itself, as steps are no longer finite.
    assert done.returncode == 3
    steps = Workdir(workdir, keep=2).steps()
    assert len(steps) == 3
    assert steps[0] == kept
    # From before the first update that had a rate: weights as they are drawn, where the newest step's are spoiled.
    good, spoiled = (
        max(np.abs(array).max() for name, array in saved_arrays(workdir, step).items() if name.startswith("llm"))
        for step in (kept, steps[-1])
    )
    assert good < 10 < 100 < spoiled
