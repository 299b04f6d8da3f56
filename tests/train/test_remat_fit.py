"""`compute.remat=fit`: what is chosen from predictions and compiled programs, and where a run keeps the choice.

Compilers and devices are stand-ins with the memory that a test gives them; bytes are counted in the real traced step.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import Budgets, OptimizerConfig, load_run_config, resolve_model
from baichuan_omni_jax.nn.remat import VALUE_NAMES
from baichuan_omni_jax.train import run as run_module
from baichuan_omni_jax.train.preflight.compile import CompiledProgram, Memory
from baichuan_omni_jax.train.preflight.fit import fit_remat, kept_bytes, with_remat
from baichuan_omni_jax.train.run import REMAT, settle_remat
from tests.helpers.micro import CONFIG

BASE = 10_000_000


@pytest.fixture(scope="module")
def run():
    """The micro run's language model alone, in bf16, one row of 256 tokens, its MLP in pieces."""
    run = load_run_config(CONFIG)
    budgets = Budgets(tokens=256, patches=0, audio_frames=0, audio_targets=0)
    return replace(
        run,
        branches=("llm",),
        optimizer=OptimizerConfig(),
        data=replace(run.data, rows=1, budgets=budgets),
        compute=replace(run.compute, dtype="bfloat16", mlp_chunk=64),
    )


def omni(run):
    return resolve_model(run.model)


def counted(run, policy: str) -> int:
    devices = jax.devices()[:1]
    return kept_bytes(with_remat(run, policy), omni(run), devices) - kept_bytes(
        with_remat(run, "full"), omni(run), devices
    )


def test_bytes_that_are_kept_are_counted(run):
    """Per layer and token in bf16; values kept beside others are not counted twice."""
    llm = omni(run).llm
    places, wide = llm.num_layers * 256 * 2, llm.hidden_size
    keys = llm.num_kv_heads * llm.head_dim
    expected = {
        "kv_gathered": places * 2 * keys,
        "qkv": places * (wide + 2 * keys),
        "mlp_in": places * wide,
        "mlp_gate_up": places * 2 * llm.intermediate_size,
        "kv_gathered+qkv": places * (wide + 2 * keys),
        "qkv@host": 0,
    }
    assert {policy: counted(run, policy) for policy in expected} == expected


def builder(run, allowed: int, extra: int = 0):
    """Compiles nothing: says `BASE` and what is counted, and `extra` where the MLP's values are kept."""
    built = []

    def build(spec, state, batch):
        policy = spec.task.run.compute.remat
        built.append(policy)
        peak = BASE + (counted(run, policy) if policy != "full" else 0) + extra * ("mlp_gate_up" in policy)
        return CompiledProgram(Memory(0, 0, peak, 0, allowed if peak > allowed else None), "", [], 0.0)

    return build, built


@pytest.mark.parametrize(
    ("room", "extra", "expected", "compiled"),
    [
        # Room for all; for all but the widest; for that too as counted, but not as compiled; for none.
        (1.0, 0, "+".join(VALUE_NAMES), 2),
        (0.9, 0, "attention_out+kv_gathered+qkv+mlp_in", 2),
        (1.0, BASE, "attention_out+kv_gathered+qkv+mlp_in", 3),
        (0.0, 0, "full", 1),
    ],
)
def test_the_largest_set_that_fits_is_chosen(run, room, extra, expected, compiled):
    """The margin of 5 % stays free."""
    available = int((BASE + room * counted(run, "+".join(VALUE_NAMES))) / 0.95) + 2
    build, built = builder(run, available, extra)
    fit, program = fit_remat(run, omni(run), jax.devices()[:1], available, build)
    assert fit.remat == expected
    assert built[0] == "full"
    assert len(built) == compiled
    assert program.memory.peak == fit.compiled[expected]
    assert ("mlp_gate_up" in fit.too_large) == (expected != "+".join(VALUE_NAMES))


def test_a_step_that_does_not_fit_at_all_keeps_nothing(run):
    build, built = builder(run, BASE - 1)
    fit, program = fit_remat(run, omni(run), jax.devices()[:1], BASE - 1, build)
    assert (fit.remat, built) == ("full", ["full"])
    assert program.memory.available == BASE - 1


def test_a_run_keeps_its_choice(run, tmp_path, monkeypatch):
    """Chosen once for a kind of device and a mesh; chosen again elsewhere. Devices that do not say: nothing is kept."""
    run, workdir = with_remat(replace(run, mesh=replace(run.mesh, fsdp=1)), "fit"), Workdir(tmp_path, 1)
    monkeypatch.setattr(run_module, "make_mesh", lambda config: SimpleNamespace(shape={"fsdp": config.fsdp}))
    console = Console(record=True, width=200)
    settle = lambda run: settle_remat(run, omni(run), workdir, console).compute.remat  # noqa: E731
    assert settle(run) == "full"
    assert "full, as cpu does not say how much memory it has" in console.export_text()
    assert not (tmp_path / REMAT).exists()

    monkeypatch.setattr(run_module, "usable_bytes", lambda device: 10 * BASE)
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    build, built = builder(run, 10 * BASE)
    monkeypatch.setattr(run_module, "compile_for_devices", lambda *step, read: build(*step))
    assert settle(run) == "+".join(VALUE_NAMES)
    assert json.loads((tmp_path / REMAT).read_text())["remat"] == "+".join(VALUE_NAMES)
    assert len(built) == 2
    # Started again, on the same devices and on another mesh.
    assert settle(run) == "+".join(VALUE_NAMES)
    assert len(built) == 2
    monkeypatch.setattr(run_module, "make_mesh", lambda config: SimpleNamespace(shape={"fsdp": 2}))
    assert settle(run) == "+".join(VALUE_NAMES)
    assert len(built) == 4


def test_a_policy_that_is_given_is_left_alone(run, tmp_path):
    assert settle_remat(run, omni(run), Workdir(tmp_path, 1), Console(quiet=True)) is run
