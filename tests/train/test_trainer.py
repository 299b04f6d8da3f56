"""The training command, run as a user runs it: to its end, again, longer, stopped, killed, and resumed exactly."""

import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from baichuan_omni_jax.audio.encoder import fingerprint
from baichuan_omni_jax.checkpoint import Workdir, find_tokenizer
from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.state import make_compute
from tests.helpers.micro import (
    STEP_TIMES,
    STEPS,
    contents,
    micro_run,
    numbers,
    one_device,
    open_micro,
    place,
    read_metrics,
    saved_arrays,
    wait_until,
)
from tests.helpers.proofs import HANG

LEVELS = [f"loss_audio_q{level}" for level in range(8)]
KEYS = ["step", "loss", "loss_text", "loss_audio", *LEVELS, "tokens", "fill_tokens", "fill_patches", "fill_audio"]
KEYS += ["gradient_norm", "nonfinite_steps", "flops_llm", "flops_vision", "flops_audio"]


def send_at(process: subprocess.Popen, workdir: Path, step: int, number: int) -> tuple[str, str]:
    """Sends the signal `number` as soon as metrics.jsonl shows `step`; returns what the process wrote."""
    if wait_until(process, lambda: any(row["step"] >= step for row in read_metrics(workdir))):
        process.send_signal(number)
    return process.communicate(timeout=HANG)


@pytest.fixture(scope="module")
def resumed(pretrain, tmp_path_factory) -> dict:
    """One run in three parts: SIGTERM after step 2, SIGKILL after step 5, then to its end."""
    workdir = tmp_path_factory.mktemp("resumed") / "run"
    steps = f"train.steps={STEPS}"
    found = {"workdir": workdir}
    with pretrain.start(workdir, steps) as process:
        found["term_output"] = send_at(process, workdir, 2, signal.SIGTERM)
    found["term_code"], found["term_metrics"] = process.returncode, read_metrics(workdir)
    found["term_saved"] = Workdir(workdir, keep=3).latest_step()
    with pretrain.start(workdir, steps) as process:
        send_at(process, workdir, 5, signal.SIGKILL)
    found["kill_code"], found["kill_metrics"] = process.returncode, read_metrics(workdir)
    found["end"] = pretrain(workdir, steps)
    return found


def test_a_run_keeps_the_tokenizer_that_made_its_codes(finished, pretrain):
    """What lies in the workdir has the fingerprint that the store of codes is named by; a seeded one is called so."""
    from baichuan_omni_jax.generation.loading import load_for_generation

    loaded = load_for_generation(str(finished), needed=("audio_encoder",))
    made_by = fingerprint(loaded.branches["audio_encoder"])
    assert (pretrain.root / ".cache" / f"codes-{made_by[:12]}").is_dir()
    assert loaded.untrained == ("audio_encoder",)
    assert find_tokenizer(micro_run(pretrain.root, f"checkpoint.init_from={finished}")) == finished / "audio_tokenizer"


def test_metrics_of_a_whole_run(finished):
    """One line a step with every key, the compilations all before the third, and TensorBoard's events beside it."""
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert STEP_TIMES.union(KEYS) <= set(row)
        assert all(np.isfinite(row[key]) for key in STEP_TIMES.union(KEYS))
        assert 0 <= row["goodput"] < 1
        assert row["loss"] == pytest.approx(row["loss_text"] + row["audio_loss_scale"] * row["loss_audio"], rel=1e-6)
        shares = {name: value for name, value in row.items() if name.startswith("loss_share/")}
        assert sum(shares.values()) == pytest.approx(1, rel=1e-5)
        of_sources = sum(share * row.get(name.replace("loss_share", "loss"), 0) for name, share in shares.items())
        assert row["loss"] == pytest.approx((1 + row["audio_loss_scale"]) * of_sources, rel=1e-5)
        assert row["loss_audio"] == pytest.approx(np.mean([row[level] for level in LEVELS]), rel=1e-6)
        assert row["skipped"] == row["oversize"] == {}
    epochs = [row["epochs"] for row in rows]
    assert all(0 < epochs[-1][source] >= epochs[0][source] for source in epochs[0])
    assert rows[2]["compiles"] == rows[-1]["compiles"] > 0
    assert np.mean([row["fill_tokens"] for row in rows]) > 0.9
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_same_command_finds_the_finished_run(finished, pretrain):
    before = contents(finished / "checkpoints"), (finished / "metrics.jsonl").read_bytes()
    again = pretrain(finished, f"train.steps={STEPS}")
    assert again.returncode == 0, again.stderr
    assert f"is finished: step {STEPS} of train.steps {STEPS}" in " ".join(again.stdout.split())
    assert (contents(finished / "checkpoints"), (finished / "metrics.jsonl").read_bytes()) == before


@pytest.mark.slow
def test_a_finished_run_goes_on_for_more_steps(finished, pretrain, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    longer = pretrain(workdir, f"train.steps={STEPS + 2}")
    assert longer.returncode == 0, longer.stderr
    assert f"resumed from step {STEPS}" in " ".join(longer.stdout.split())
    rows = numbers(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 3))
    assert rows[:STEPS] == numbers(finished)
    assert Workdir(workdir, keep=3).latest_step() == STEPS + 2


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_exit_code_0(resumed):
    out, err = resumed["term_output"]
    assert resumed["term_code"] == 0, err
    last = resumed["term_metrics"][-1]["step"]
    assert 2 <= last < STEPS, "the signal came too late to stop anything"
    assert resumed["term_saved"] == last
    assert f"stopped by SIGTERM: step {last} is saved" in " ".join(out.split())


@pytest.mark.slow
def test_killed_run_repeats_the_uninterrupted_one_exactly(finished, resumed):
    """Every number of every step, and every parameter and moment of the last, bit for bit."""
    assert resumed["kill_code"] == -signal.SIGKILL
    assert 5 <= resumed["kill_metrics"][-1]["step"] < STEPS, "the kill came too late to interrupt anything"
    end = resumed["end"]
    assert end.returncode == 0, end.stderr
    assert "resumed from step" in end.stdout
    assert numbers(resumed["workdir"]) == numbers(finished)
    whole, parts = (saved_arrays(path, STEPS) for path in (finished, resumed["workdir"]))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not np.array_equal(whole[name], parts[name])] == []


def test_forward_pass_changes_no_variable(micro_root, tmp_path, monkeypatch):
    """Under jax.jit a changed nnx.Variable is silently lost (layers are scanned over copies): no module may do it."""
    run, mesh = micro_run(micro_root), one_device()
    omni = resolve_model(run.model)
    pipeline, codes = open_micro(run, tmp_path / "codes")
    with jax.set_mesh(mesh):
        compute = make_compute(run)
        batch = place(next(pipeline.steps(codes)).batch, mesh, compute.rules)
        model = jax.eval_shape(lambda: OmniModel(jax.random.key(0), omni, compute))
        changed = []
        for method in ("set_value", "set_raw_value", "__setitem__", "copy_from", "update_from_state"):
            monkeypatch.setattr(nnx.Variable, method, lambda self, *_, **__: changed.append(self))

        def call(model, batch):
            before = jax.tree.leaves(model)
            model(batch)
            assert all(old is new for old, new in zip(before, jax.tree.leaves(model), strict=True))

        jax.eval_shape(call, model, batch)
        assert changed == []
