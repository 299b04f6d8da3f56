"""Two hosts of which one is stopped: named within the deadline, stacks of both, started again, the same end. Slow."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.micro import (
    CONFIG,
    REPOSITORY,
    Command,
    environment,
    numbers,
    overrides,
    read_metrics,
    saved_arrays,
    small_copy,
)
from tests.helpers.proofs import HANG, wait_for

pytestmark = pytest.mark.slow

PHASES = REPOSITORY / "tests" / "helpers" / "faults" / "phases.py"
STEPS = 24
RUN = ("mesh.data=2", "data.rows=4", f"train.steps={STEPS}", "checkpoint.every=4", "checkpoint.keep=20")
# Shorter than anybody would have them; a step takes a third of a second, so that one can be met.
DEADLINES = ("watch.hang_s=15", "watch.silent_s=12")


@pytest.fixture(scope="module")
def command(sample_dir, tmp_path_factory) -> Command:
    folder = tmp_path_factory.mktemp("hangs")
    return Command(small_copy(sample_dir, folder / "data"), folder / "xla", quick=True)


def start(command: Command, workdir: Path, host: int, port: int, *changes: str) -> subprocess.Popen:
    """A host under its supervisor, which writes into WORKDIR.HOST.txt."""
    train = [sys.executable, str(PHASES), "steps", "--config", str(CONFIG), "--workdir", str(workdir), "--multihost"]
    train += [f"--coordinator=localhost:{port}", "--hosts=2", f"--host={host}", "--stopped-code=75"]
    train += [part for item in (*overrides(command.root), *RUN, *changes) for part in ("--set", item)]
    supervise = ["bash", str(REPOSITORY / "launch/recipes/supervise"), "--pause", "1", "--silent", "30"]
    with open(f"{workdir}.{host}.txt", "w") as file:
        variables = environment(command.cache, quick=True)
        return subprocess.Popen([*supervise, "--", *train], stdout=file, stderr=file, env=variables)


def run(command: Command, workdir: Path, *changes: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(command, workdir, host, port, *changes) for host in range(2)]


def finish(hosts: list[subprocess.Popen], workdir: Path) -> list[str]:
    try:
        codes = [host.wait(HANG) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    texts = [Path(f"{workdir}.{host}.txt").read_text() for host in range(2)]
    assert codes == [0, 0], texts
    return texts


def trainer_of(supervisor: subprocess.Popen) -> int:
    """The process id of the training command."""
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(supervisor.pid)], capture_output=True, text=True)
    return next(int(line.split()[0]) for line in found.stdout.splitlines() if "python" in line)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run(command, workdir), workdir)
    return workdir


@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_host_is_named_and_the_run_ends_the_same(stopped, command, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    hosts = run(command, workdir, *DEADLINES)
    wait_for(lambda: any(row["step"] >= 9 for row in read_metrics(workdir)), "step 9", hosts[0])
    process = trainer_of(hosts[stopped])
    os.kill(process, signal.SIGSTOP)
    began = time.monotonic()
    other = Path(f"{workdir}.{1 - stopped}.txt")
    wait_for(lambda: "hung: " in other.read_text(), "the other host's word", hosts[1 - stopped])
    # Busy cores: twice the deadline, and what its threads are late by.
    assert time.monotonic() - began < 60
    texts = finish(hosts, workdir)
    hung = next(line for line in texts[1 - stopped].splitlines() if "hung: " in line)
    named = {1: "host 1 has given no sign of life", 0: "host 0, which has the coordination service, has not answered"}
    assert named[stopped] in hung
    assert "the command left with 76" in texts[1 - stopped]
    # Its supervisor asked the stopped one for its stacks: those of the moment at which it was stopped.
    assert "no sign of life for 30 s: killed" in texts[stopped]
    for host in range(2):
        stacks = (workdir / "hangs" / f"host_{host}.txt").read_text()
        assert "trainer.py" in stacks, (host, stacks)
    assert numbers(workdir) == numbers(undisturbed)
    expected = saved_arrays(undisturbed, STEPS)
    found = saved_arrays(workdir, STEPS)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
