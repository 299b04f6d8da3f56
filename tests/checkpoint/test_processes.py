"""Checkpoints and processes: killed while saving, and saved on one mesh but read on another."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from baichuan_omni_jax.checkpoint import Workdir, verify_checksums, with_shardings
from baichuan_omni_jax.config import MeshConfig, RunConfig
from baichuan_omni_jax.nn.param import named_variables
from baichuan_omni_jax.sharding import ShardingRules, make_mesh
from tests.checkpoint.test_checkpoint import abstract, assert_equal, make_state, save
from tests.helpers.proofs import HANG

RULES = ShardingRules()

KILLED = """
import sys
sys.path[:0] = sys.argv[3:]
import os, signal
from pathlib import Path
from tests.checkpoint.test_checkpoint import Workdir, make_state, save
from baichuan_omni_jax.checkpoint import trees

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def die_half_written(folder, known):
    (folder / "checksums.json").write_text("{")
    die()

def die_half_removed(workdir, saved):
    for step in workdir.steps()[:-1]:
        (tmp_path / "checkpoints" / str(step) / "checksums.json").unlink()
        die()

tmp_path, moment = Path(sys.argv[1]), sys.argv[2]
workdir = Workdir(tmp_path, keep=2)
first = (workdir.latest_step() or 0) + 1
states = [make_state(0), make_state(1)]
if moment == "checksums":
    trees.write_checksums = die_half_written
if moment == "removal":
    Workdir._remove_old = die_half_removed
print("ready", flush=True)
for step in range(first, 10000):
    save(workdir, step, *states[step % 2])
"""


def kill_while_saving(path: Path, moment: str, seconds: float) -> None:
    """A process that saves step after step without a pause, killed after `seconds` or by itself at `moment`."""
    repository = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(path), moment, repository]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"ready\n"
        if moment == "any":
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=HANG) == -signal.SIGKILL


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Every step that is there after a SIGKILL is whole, and the next start removes what is not."""
    rng = random.Random(0)
    branches, opt_state = make_state()
    before = 0
    for moment in ("any", "removal", "checksums"):
        kill_while_saving(tmp_path, moment, rng.uniform(0.2, 0.6))
        workdir = Workdir(tmp_path, keep=2)
        for step in workdir.steps():
            assert verify_checksums(tmp_path / "checkpoints" / str(step)) is None
        restored = workdir.restore(None, abstract(branches), abstract(opt_state))
        assert_equal((restored.branches, restored.opt_state), make_state(restored.step % 2))
        assert restored.step >= before
        before = restored.step
    workdir.write_run_config(RunConfig(name="x"))
    left = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert left == workdir.steps()


def on_mesh(config: MeshConfig, devices: list[jax.Device]) -> tuple[jax.sharding.Mesh, dict, object]:
    """The abstract state of `make_state` with its branches sharded over a mesh of `devices`."""
    mesh = make_mesh(config, devices)
    branches, opt_state = jax.eval_shape(make_state)
    placed = {name: with_shardings(module, mesh, RULES, name=name) for name, module in branches.items()}
    return mesh, placed, abstract(opt_state, mesh)


def check_other_meshes(path: str) -> None:
    """Run in a process of 8 CPU devices: saved on one mesh, read on smaller ones and on one device."""
    devices = jax.devices()
    assert len(devices) == 8
    _, placed, opt_target = on_mesh(MeshConfig(fsdp=4, context=2), devices)
    branches, opt_state = make_state()
    # device_put may share buffers with its argument, which the donation below would take along.
    sharded, moments = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), make_state(), (placed, opt_target))
    workdir = Workdir(path, keep=1)
    save(workdir, 1, sharded, moments)
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)((sharded, moments)))
    for config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2), MeshConfig(data=2, fsdp=2, context=2)):
        count = config.data * config.fsdp * config.context * config.tensor
        mesh, target, opt_target = on_mesh(config, devices[8 - count :])
        restored = workdir.restore(None, target, opt_target)
        assert_equal((restored.branches, restored.opt_state), (branches, opt_state))
        for name, variable in named_variables(restored.branches).items():
            assert variable.get_value().sharding == named_variables(target)[name].get_value().sharding, name
            assert variable.get_value().sharding.mesh == mesh
    workdir.close()
    print("meshes agree")


@pytest.mark.slow
def test_restored_on_other_meshes(tmp_path: Path) -> None:
    repository = str(Path(__file__).parents[2])
    code = "import sys; sys.path[:0] = sys.argv[2:]; import tests.checkpoint.test_processes as t; "
    code += "t.check_other_meshes(sys.argv[1])"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, str(tmp_path), repository]
    result = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, check=False)
    assert "meshes agree" in result.stdout, result.stderr
