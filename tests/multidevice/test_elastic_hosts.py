"""A run goes on with other rows, on other hosts, and from the hosts' own disks after all were killed. Slow."""

import json
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.faults.uninterrupted import assert_same_run, committed, last_step, resumed_from
from tests.helpers.micro import Command, small_copy, wait_until
from tests.helpers.proofs import HANG

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).parents[1] / "helpers" / "faults" / "recorded.py"


@pytest.fixture(scope="module")
def command(sample_dir, tmp_path_factory) -> Command:
    folder = tmp_path_factory.mktemp("elastic")
    return Command(small_copy(sample_dir, folder / "data"), folder / "xla", RECORDED, quick=True)


def start(command: Command, workdir: Path, hosts: int, devices: int, *changes: str) -> list[subprocess.Popen]:
    if hosts == 1:
        return [command.start(workdir, *changes, devices=devices)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ("--multihost", f"--coordinator=localhost:{port}", f"--hosts={hosts}")
    return [command.start(workdir, *changes, *flags, f"--host={host}", devices=devices) for host in range(hosts)]


def finish(processes: list[subprocess.Popen]) -> str:
    """What host 0 said of a start that went well."""
    try:
        outputs = [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0][0]


def trained_on(workdir: Path) -> Counter:
    """How often each (source, document) was in a row, of all hosts and starts."""
    lines = [line for path in workdir.glob("documents*.jsonl") for line in path.read_text().splitlines()]
    return Counter(tuple(key) for line in lines for row in json.loads(line) for key in row)


def waiting(state: dict) -> Counter:
    """The documents that were read and are in no row yet that was given."""
    packed = state["rows"]
    return Counter(tuple(key) for row in [packed["pool"], *packed["open"], *state.get("left", [])] for key in row)


def test_every_document_once_an_epoch_with_other_rows_and_hosts(command, tmp_path):
    """16 rows on two hosts, 32 on one, 8 on four; the window of four steps is left in the middle each time."""
    workdir, last = tmp_path / "run", 0
    for rows, hosts, devices, steps in ((16, 2, 2, 2), (32, 1, 2, 1), (8, 4, 1, 4)):
        last += steps
        changes = (f"data.rows={rows}", f"mesh.data={hosts * devices}", f"train.steps={last}", "data.order_window=4")
        said = " ".join(finish(start(command, workdir, hosts, devices, *changes)).split())
        assert resumed_from(said) == last - steps
    assert "since the start before: " in said
    assert "data.rows 32 -> 8" in said
    starts = json.loads((workdir / "starts.json").read_text())["starts"]
    assert [(begun["step"], begun["hosts"], begun["devices"]) for begun in starts] == [(0, 2, 4), (2, 1, 2), (3, 4, 4)]
    assert [begun["changed"].get("data.rows") for begun in starts] == [None, [16, 32], [32, 8]]

    state = json.loads((workdir / "checkpoints" / str(last) / "data.json").read_text())
    # At the end of a window: all that was read has been given, or is named by the state.
    assert (state["given"], len(state["left"])) == (0, 3 * 32 - 4 * 8)
    found = trained_on(workdir) + waiting(state)
    for number, source in enumerate(state["sources"].values()):
        times = [found[number, document] for document in range(source["documents"])]
        assert sum(times) == source["cursor"]
        assert max(times) - min(times) <= 1, times


def test_a_run_whose_hosts_were_all_killed_goes_on_from_their_own_disks(command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ("data.rows=4", "mesh.data=2", "mesh.fsdp=2", "checkpoint.every=4", "checkpoint.local_every=1")
    workdir = tmp_path / "run"
    hosts = start(command, workdir, 2, 2, *settings, "train.steps=100000")

    def kept() -> list[int]:
        """The steps that both hosts have."""
        steps = [{int(path.name) for path in folder.iterdir() if path.name.isdecimal()} for folder in folders()]
        return sorted(set.intersection(*steps)) if len(steps) == 2 else []

    def folders() -> list[Path]:
        return list((tmp_path / "cache").glob("*/workdirs/*-steps_*"))

    # Two steps past a save, so that the newest step of both hosts is not in the workdir.
    assert wait_until(hosts[0], lambda: bool(committed(workdir)) and max(kept(), default=0) % 4 == 2)
    for process in hosts:
        process.send_signal(signal.SIGKILL)
    for process in hosts:
        process.communicate()
    newest, last = max(kept()), last_step(workdir)
    assert newest > committed(workdir)[-1]
    assert resumed_from(finish(start(command, workdir, 2, 2, *settings, f"train.steps={last + 3}"))) == newest
    whole = tmp_path / "whole"
    finish(start(command, whole, 2, 2, *settings, f"train.steps={last + 3}"))
    assert_same_run(workdir, whole, last + 3)
    # The saves since have taken their place.
    assert kept() == []


def test_a_new_machine_among_the_hosts_sends_all_to_the_workdir(command, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ("data.rows=4", "mesh.data=2", "mesh.fsdp=2", "checkpoint.every=4", "checkpoint.local_every=1")
    workdir = tmp_path / "run"
    hosts = start(command, workdir, 2, 2, *settings, "train.steps=100000")
    assert wait_until(hosts[0], lambda: bool(committed(workdir)) and last_step(workdir) % 4 == 3)
    for process in hosts:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (own,) = (tmp_path / "cache").glob("*/workdirs/*-steps_1")
    for step in own.iterdir():
        step.rename(own / f"{step.name}.partial")
    saved = committed(workdir)[-1]
    assert resumed_from(finish(start(command, workdir, 2, 2, *settings, f"train.steps={saved + 2}"))) == saved
