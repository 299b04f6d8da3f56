"""Preflight: what it says of a compiled step, its sentences where something cannot be used, and its parsers.

Collectives are read off HLO text: every way to write groups, loops and their lengths, asynchronous halves, fusions.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from baichuan_omni_jax.cli import preflight as command
from baichuan_omni_jax.config import load_run_config, tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.preflight import Packing, devices_of
from baichuan_omni_jax.train.preflight.compile import Memory, refused
from baichuan_omni_jax.train.preflight.gpu import PLUGINS
from baichuan_omni_jax.train.preflight.hlo import Collective, collectives_of, largest_temporaries
from baichuan_omni_jax.train.preflight.render import short_scope
from baichuan_omni_jax.train.preflight.report import suggestions
from tests.helpers.proofs import HANG

REPOSITORY = Path(__file__).resolve().parents[2]
MICRO = REPOSITORY / "configs" / "micro.py"
GIB = 2**30
needs_cuda = pytest.mark.skipif(
    not any(map(find_spec, PLUGINS)), reason="JAX's CUDA plugin is not installed (extra `cuda`)"
)
needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (extra `preflight`)")


def preflight(*arguments: str, timeout: int = 60) -> subprocess.CompletedProcess:
    started = [sys.executable, str(REPOSITORY / "launch" / "preflight.py"), *arguments]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(started, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


ASSIGNMENT = """\
allocation 1: size 400, page 0, parameter 0, shape |f32[100]| at ShapeIndex {}:
 value: <1 param @0> (size=400,offset=0): f32[100]{0}
allocation 2: size 9000, color 3, page 0, preallocated-temp:
 value: <2 other @0> (size=9000,offset=0): f32[2250]{0}
allocation 3: size 1000, page 0, preallocated-temp:
 value: <3 allocate.1 @0> (size=600,offset=0): f32[150]{0}
 value: <4 update.2 @0> (size=600,offset=0): f32[150]{0}
 value: <5 overlapping @0> (size=500,offset=200): f32[125]{0}
 value: <6 last @0> (size=400,offset=600): bf16[200]{0}
"""
HLO = """\
  %update.2 = f32[150]{0} fusion(%a), metadata={op_name="jit(step)/jvp(llm)/while/body/mlp/dot_general"}
  ROOT %last = bf16[200]{0} copy(%b), metadata={op_name="jit(step)/transpose(jvp(projector))/bpf,fd->bpd/add"}
"""


def test_largest_temporaries_do_not_overlap():
    found = largest_temporaries(ASSIGNMENT, HLO)
    assert [(one.bytes, one.array) for one in found] == [(600, "f32[150]"), (400, "bf16[200]")]
    assert [short_scope(one.scope) for one in found] == ["llm/mlp/dot_general", "backward of projector/add"]


@pytest.mark.parametrize(
    "message",
    [
        "the total memory required for HLO temporaries (480.00G) exceeds available HBM (95.5G). HLO module: jit_step.",
        "Ran out of memory in memory space hbm. Used 480.00G of 95.5G hbm. Exceeded hbm capacity by 384.50G.",
    ],
)
def test_refusals_are_read(message):
    memory = refused(message, arguments=80 * GIB)
    assert (memory.peak, memory.args, memory.available) == (480 * GIB, 80 * GIB, int(95.5 * GIB))


def test_another_error_is_no_refusal():
    assert refused("Mosaic failed to compile TPU kernel", arguments=0) is None


def test_suggestions_name_settings_that_would_help():
    run = load_run_config(REPOSITORY / "configs" / "omni_64k.py")
    wasteful = replace(
        run,
        compute=replace(run.compute, remat="none", mlp_chunk=0, loss_chunk=65536),
        train=replace(run.train, frozen_dtype="float32"),
    )
    mesh = {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    text = "\n".join(suggestions(wasteful, mesh, Memory(60 * GIB, 0, 50 * GIB, 0), 95 * GIB))
    for setting in ("remat=full", "mlp_chunk=1024", "loss_chunk=1024", "accumulate=2", "frozen_dtype=bfloat16"):
        assert setting in text
    assert "--set mesh.fsdp=4 --set mesh.context=2" in text
    assert "15.0 GiB too much" in text
    chunked = replace(run, compute=replace(run.compute, loss_chunk=1024, remat="full"))
    modest = "\n".join(suggestions(chunked, {**mesh, "fsdp": 16}, Memory(GIB, 0, 95 * GIB, 0), 95 * GIB))
    assert "remat" not in modest
    assert "loss_chunk" not in modest


def test_packing_counts_full_rows():
    run, omni = load_run_config(MICRO), tiny()
    counts = Packing(image_patches=48).counts(run, omni)
    budgets, rows = run.data.budgets, run.data.rows
    assert counts["tokens"] == rows * budgets.tokens
    # 256 patches: five images of 48 and one of 16.
    assert counts["patch_pairs"] == rows * (5 * 48**2 + 16**2)
    assert counts["text_targets"] == rows * (budgets.tokens - budgets.patches // 4 - budgets.audio_frames)
    longest = budgets.tokens * (budgets.tokens + 1) // 2 * rows
    assert Packing(mean=1e9).counts(run, omni)["causal_pairs"] == longest
    assert Packing(mean=1.0, sigma=0.0).counts(run, omni)["causal_pairs"] == rows * budgets.tokens


def test_packing_of_the_language_model_alone_has_no_media():
    run = replace(load_run_config(MICRO), branches=("llm",))
    counts = Packing().counts(run, tiny())
    assert counts["patches"] == counts["patch_pairs"] == counts["audio_frames"] == counts["audio_targets"] == 0
    assert counts["text_targets"] == counts["tokens"]


def test_missing_libtpu_is_said(monkeypatch):
    monkeypatch.setattr("baichuan_omni_jax.train.preflight.compile.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu is not installed: pip install"):
        devices_of("v5p:2x2x1")


@pytest.mark.parametrize("topology", ["h100:0", "h100:", "h100:2x4"])
def test_gpus_are_counted(topology):
    with pytest.raises(ConfigError, match=f"--topology {topology} is not a number of GPUs, such as h100:1"):
        devices_of(topology)


def test_gpus_need_the_plugin_and_form_no_slices(monkeypatch):
    with pytest.raises(ConfigError, match=r"mesh\.slices is 2: only TPU slices are joined, not h100:1"):
        devices_of("h100:1", slices=2)
    monkeypatch.setattr("baichuan_omni_jax.train.preflight.gpu.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"JAX's CUDA plugin is not installed: pip install"):
        devices_of("h100:1")


def test_the_machine_of_a_run_is_its_topology(monkeypatch):
    """A configuration of its own kind names none: there the topology must be given."""

    def preflight(run, omni, topology, packing):
        raise ConfigError(f"would compile for {topology}")

    monkeypatch.setattr("baichuan_omni_jax.train.preflight.preflight", preflight)
    for arguments, message in (
        (["--config", "sft", "--set", "machine=v5e:2x4"], "would compile for v5e:2x4"),
        (["--config", "sft", "--set", "machine=v5e:2x4", "--topology", "v6e:2x4"], "would compile for v6e:2x4"),
        (["--config", str(MICRO)], "--topology must be given: .* is for no machine of its own"),
    ):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        with pytest.raises(ConfigError, match=message):
            command.run(parser.parse_args(arguments))


@needs_cuda
@pytest.mark.slow
def test_micro_run_on_a_gpu(tmp_path):
    done = preflight(
        "--config", str(MICRO), "--topology", "h100:1", "--json", str(tmp_path / "report.json"), timeout=HANG
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"] is True
    assert report["device_kind"].startswith("NVIDIA H100")
    # One chip has no one to exchange with, and JAX does not take all of its memory.
    assert report["collectives"] == []
    assert report["hbm_bytes"] == 76 * GIB


@pytest.mark.slow
def test_output_folder_is_checked_first():
    done = preflight("--config", str(MICRO), "--topology", "v5p:2x2x1", "--json", "/nowhere/at/all.json")
    assert done.returncode == 2
    assert done.stderr == "error: --json /nowhere/at/all.json: there is no folder /nowhere/at\n"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v9:2x2"), "--topology v9:2x2 is not one that libtpu knows"),
        (("--topology", "v5p:2x2x1"), "mesh 1x1x1x1 (data x fsdp x context x tensor) does not cover the 4 devices"),
        (("--topology", "v5e:2x2", "--slices", "2", "--set", "mesh.fsdp=8"), "mesh.data 1 is not a multiple of"),
    ],
)
def test_topologies_that_do_not_fit(arguments, message):
    done = preflight("--config", str(MICRO), *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@needs_libtpu
@pytest.mark.slow
def test_micro_run_on_four_chips(tmp_path, monkeypatch):
    """The whole command: exit code, what the report must hold, and that its numbers agree with each other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = ("mesh.fsdp=2", "mesh.context=2", "data.media_shards=2", "data.context_block=64")
    changes = [part for change in sets for part in ("--set", change)]
    outputs = ("--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "report.png"))
    done = preflight("--config", str(MICRO), "--topology", "v5p:2x2x1", *changes, *outputs, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fits"] is True
    assert report["hbm_bytes"] > 95 * 10**9
    parts = ("args_bytes", "temp_bytes", "output_bytes", "code_bytes")
    assert report["peak_bytes"] == sum(report[part] for part in parts)
    held = sum(group["parameter_bytes"] + group["optimizer_bytes"] for group in report["groups"])
    assert 0 < held <= report["args_bytes"]
    # Two fp32 moments a trainable parameter, split like it.
    assert all(group["optimizer_bytes"] >= 2 * group["parameter_bytes"] * 0.99 for group in report["groups"])
    gathers = [one for one in report["collectives"] if one["kind"] == "all-gather"]
    assert any("fsdp" in one["axes"] for one in gathers)
    assert report["model_flops"]["total"] == pytest.approx(sum(report["flops_by_term"].values()))
    # The model's products are among those that are done.
    assert 0 < report["time"]["mfu"] < report["time"]["hfu"] < 1
    assert "predicted, not measured" in done.stdout
    # Again: the same program is not compiled a second time.
    again = preflight("--config", str(MICRO), "--topology", "v5p:2x2x1", *changes, *outputs, timeout=HANG)
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert found.pop("seconds") < report.pop("seconds")
    assert found == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


HLO_MESH = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
HLO_MODULE = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[8,4]) -> f32[2,4] {
  ROOT %reduce-scatter.1 = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, \
to_apply=%add, metadata={op_name="jit(step)/backward"}
}

%body (s: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %all-gather-start.1 = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}) all-gather-start(%g), \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, metadata={op_name="jit(step)/while/body/weights"}
  %all-gather-done.1 = bf16[4,8]{1,0} all-gather-done(%all-gather-start.1)
  %scattered = f32[2,4]{1,0} fusion(%h), kind=kCustom, calls=%fused
}

%cond (s: (s32[], bf16[2,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%wrapped (p: f32[16]) -> f32[16] {
  ROOT %permute = f32[16]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{4,5}}
}

ENTRY %main (a: f32[16], b: f32[16]) -> f32[] {
  %loop = (s32[], bf16[2,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  %async-start = ((f32[16]), f32[16], u32[]) async-start(%a), calls=%wrapped
  %async-done = f32[16] async-done(%async-start), calls=%wrapped
  %mesh = f32[] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1':(2)2}, to_apply=%add
  %alone = f32[] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %all = (f32[4]{0}, f32[]) all-reduce(%y, %z), replica_groups={}, to_apply=%add
}
"""


def test_every_collective_is_found_once():
    found = collectives_of(HLO_MODULE, HLO_MESH)
    assert found == [
        Collective("reduce-scatter", 8 * 4 * 4, ("context",), "jit(step)/backward", 1, 28),
        Collective("all-gather", 4 * 8 * 2, ("fsdp",), "jit(step)/while/body/weights", 1, 28),
        Collective("collective-permute", 64, ("context",), "", 0, 1),
        Collective("all-reduce", 4, ("fsdp", "context"), "", 0, 1),
        Collective("all-reduce", 20, ("fsdp", "context"), "", 0, 1),
    ]


def test_text_of_another_mesh_is_refused():
    with pytest.raises(ValueError, match="more devices than the mesh"):
        collectives_of(HLO_MODULE, {"data": 2})


def test_loop_length_is_read_off_its_condition():
    """As XLA writes programs for TPU: the loop carries no note, its condition compares the counter with a constant."""
    silent = HLO_MODULE.replace(', backend_config={"known_trip_count":{"n":"28"}}', "")
    bounded = silent.replace("  ROOT %less", "  %n = s32[]{:T(128)} constant(28)\n  ROOT %less")
    assert collectives_of(bounded, HLO_MESH) == collectives_of(HLO_MODULE, HLO_MESH)
    assert [one.times for one in collectives_of(silent, HLO_MESH)] == [1] * 5
