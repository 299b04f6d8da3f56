"""The step that is run twice: its rows, and what is said of its results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.doctor import Setting, Verdict, step
from baichuan_omni_jax.omni.batch import FIELDS
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.state import make_compute, make_step_spec


def test_rows_are_those_that_the_step_reads():
    """Shapes and types of every field, on one device and as rows of four; tokens and codes exist."""
    omni = resolve_model("tiny")
    run = step.tiny_run(1, "float32")
    mesh = make_mesh(run.mesh, jax.devices()[:1])
    shapes = make_step_spec(run, omni, mesh, make_compute(run)).task.abstract_batch(mesh)
    rows = step.made_up_rows(1, omni)
    assert {name: (each.shape, each.dtype) for name, each in rows.items()} == {
        name: (each.shape, each.dtype) for name, each in shapes.items()
    }
    assert {name: each.dtype for name, each in rows.items()} == {name: np.dtype(FIELDS[name].dtype) for name in rows}
    assert len({each.shape[0] for each in step.made_up_rows(4, omni).values()} - {4}) == 0
    assert (rows["audio_codes"] < np.array(omni.audio.codebook_sizes)).all()
    # What predicts a frame is a token of the first document, behind its media.
    assert (rows["segment_ids"][0, rows["audio_target_index"][0]] == 1).all()
    assert rows["audio_index"].max() < rows["audio_target_index"].min()


@pytest.mark.parametrize(("devices", "data", "fsdp"), [(1, 1, 1), (4, 1, 4), (64, 8, 8), (6, 3, 2)])
def test_parameters_are_split_over_at_most_eight_devices(devices, data, fsdp):
    run = step.tiny_run(devices, "bfloat16")
    assert (run.mesh.data, run.mesh.fsdp, run.data.rows) == (data, fsdp, devices)


def test_arrays_that_differ_in_one_bit_are_named():
    one = {"a": jnp.zeros(3), "b": jnp.asarray([1.0, jnp.nan])}
    assert step.list_differing(one, {"a": jnp.zeros(3), "b": jnp.asarray([1.0, jnp.nan])}) == []
    # Equal as numbers, not as bits.
    assert step.list_differing(one, one | {"a": -jnp.zeros(3)}) == ["['a']"]


def lines(loss: float, differing: list[str], moved: list[str]) -> list[tuple[Verdict, str]]:
    return [(line.verdict, line.text) for line in step._step_lines(loss, differing, moved, 1.0, 0.1)]


def test_what_is_said_of_a_step():
    told = "compiled and run in 1.0 s, run again in 100 ms, loss 2.000"
    assert lines(2.0, [], ["w"]) == [
        (Verdict.OK, told),
        (Verdict.OK, "the same step twice gives the same bits"),
    ]
    assert lines(2.0, [], [])[0] == (Verdict.FAIL, f"{told}, but no parameter was updated")
    assert lines(float("nan"), [], ["w"])[0][0] is Verdict.FAIL
    assert lines(2.0, ["w", "v"], ["w"])[1] == (
        Verdict.FAIL,
        "the same step twice differs in 2 arrays, w among them",
    )


def test_on_a_gpu_other_bits_are_a_warning(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (_, line) = step._step_lines(2.0, ["w"], ["w"], 1.0, 0.1)
    assert line.verdict is Verdict.WARN
    assert "xla_gpu_deterministic_ops" in line.advice


@pytest.mark.slow
def test_a_step_here_gives_the_same_bits_twice():
    found = list(step.check_step(Setting()))
    assert [line.verdict for line in found] == [Verdict.OK, Verdict.OK]
    assert 5 < found[0].values["loss"] < 20
