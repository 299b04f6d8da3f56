"""A recipe with nothing stubbed but Google: uv, Python 3.12, the pinned versions, two hosts that train, are preempted
by SIGTERM, and go on. Slow; needs uv and a package index.
"""

import glob
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from baichuan_omni_jax.checkpoint import Workdir
from tests.helpers.micro import numbers, overrides, read_metrics
from tests.helpers.stand_ins import RECIPES, Cloud, ended, wait_for

pytestmark = pytest.mark.slow
STEPS = 60
WHERE = {"NAME": "omni", "ZONE": "z", "TYPE": "v5p-16", "ACCELERATOR": "cpu", "EXTRAS": "", "POLL": "0.5"}
# What uv and the machine's own certificates need of the environment.
KEPT = ("SSL_", "UV_", "HTTP", "http", "REQUESTS_", "NO_PROXY", "no_proxy")


@pytest.fixture
def cloud(tmp_path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    cloud = Cloud(tmp_path / "cloud", hosts=2, real=True)
    (tmp_path / "cloud" / "host_bin" / "uv").symlink_to(uv)
    # A Python 3.12 that this machine has already saves its download.
    for python in [
        shutil.which("python3.12"),
        *glob.glob(os.path.expanduser("~/.pyenv/versions/3.12.*/bin/python3.12")),
    ]:
        if python and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0:
            (tmp_path / "cloud" / "host_bin" / "python3.12").symlink_to(python)
            break
    variables = {name: value for name, value in os.environ.items() if name.startswith(KEPT)}
    variables |= {"UV_CACHE_DIR": os.path.expanduser("~/.cache/uv"), "JAX_PLATFORMS": "cpu"}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "xla")
    # Hosts of a slice find each other by what Google tells them; these by what Slurm does.
    variables |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    own = {host: {"SLURM_PROCID": host, "SLURM_LOCALID": "0"} for host in ("0", "1")}
    cloud.set(variables=variables, host_variables=own)
    yield cloud
    cloud.close()


def check_versions(python: Path) -> None:
    """An environment of Python 3.12 that has what the constraints say of what it has."""
    listing = "import sys, importlib.metadata as m; print(*sys.version_info[:2])\n"
    listing += "for found in m.distributions(): print(found.name, found.version)"
    done = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True)
    first, *lines = done.stdout.splitlines()
    assert first == "3 12"
    installed = {name.lower().replace("_", "-"): version for name, version in map(str.split, lines)}
    for line in (RECIPES / "constraints-cpu.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        assert line.startswith("#") or installed.get(name, version) == version, line


def test_two_hosts_are_installed_train_are_preempted_and_finish(cloud, micro_root, tmp_path):
    workdir = tmp_path / "bucket" / "run"
    settings = [*overrides(micro_root), f"train.steps={STEPS}", "checkpoint.every=20", "mesh.fsdp=2"]
    run = ["--config", "configs/micro.py", "--workdir", str(workdir)]
    run += [part for setting in settings for part in ("--set", setting)]
    process = cloud.start("tpu.sh", "run", *run, SPOT="1", **WHERE)
    wait_for(lambda: process.poll() is not None or len(read_metrics(workdir)) > 3, 1800)
    check_versions(cloud.path / "slices" / "omni" / "1" / "omni" / ".venv" / "bin" / "python")
    # The slice is taken away; both hosts save the same step within the grace period.
    cloud.preempt("omni", grace=120)
    saved = Workdir(workdir, keep=3).latest_step()
    assert saved is not None
    assert 3 < saved < STEPS
    assert read_metrics(workdir)[-1]["step"] == saved

    code, said = ended(process)
    log = (cloud.path / "omni.log").read_text()
    assert code == 0, said + log
    assert f"resumed from step {saved}" in " ".join(log.split())
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert Workdir(workdir, keep=3).latest_step() == STEPS
    assert cloud.slices() == []

    # The same in one piece: equal numbers to the last bit.
    whole = tmp_path / "bucket" / "whole"
    run[run.index("--workdir") + 1] = str(whole)
    code, said = cloud.run("tpu.sh", "run", *run, **WHERE)
    assert code == 0, said
    assert numbers(whole) == numbers(workdir)
