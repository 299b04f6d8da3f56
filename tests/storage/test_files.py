"""Files appear whole or not at all; locks of files and of workdirs, and what becomes of them when a program dies."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import atomic_write, take_lock, write_json

ROOT = Path(__file__).resolve().parents[2]
HOLDER = r"""
import os, sys, time
from pathlib import Path
from baichuan_omni_jax.storage import take_lock

lock = take_lock(Path(sys.argv[1]), "", wait=WAIT)
if FORK == 0:
    os.write(1, b"held %d\n" % os.getpid())
time.sleep(600)
"""


def start(path: Path, fork: str = "os.fork()", wait: bool = False) -> subprocess.Popen:
    script = HOLDER.replace("FORK", fork).replace("WAIT", str(wait))
    return subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path/.lock`, and a child that it forked afterwards: (process, the child's id)."""
    with start(tmp_path / ".lock") as process:
        try:
            child = int(process.stdout.readline().removeprefix("held "))
            yield process, child
            os.kill(child, signal.SIGKILL)
        finally:
            process.kill()


def test_a_second_program_is_refused_and_told_who_is_at_work(tmp_path, holder):
    process, _ = holder
    with pytest.raises(ConfigError, match=rf"^busy \(process {process.pid} on \S+, since 20\d\d-"):
        take_lock(tmp_path / ".lock", "busy")


def test_a_killed_program_leaves_its_lock_to_the_next(tmp_path, holder):
    """Though a child of it lives on."""
    process, child = holder
    process.kill()
    process.wait()
    os.kill(child, 0)
    take_lock(tmp_path / ".lock", "busy").release()


def test_waiting_ends_when_the_other_is_gone(tmp_path, holder):
    process, _ = holder
    with start(tmp_path / ".lock", fork="0", wait=True) as waiting:
        try:
            process.kill()
            assert waiting.stdout.readline() == f"held {waiting.pid}\n"
        finally:
            waiting.kill()


def test_a_file_system_without_locks_is_worked_on(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    take_lock(tmp_path / ".lock", "busy")
    assert "has no locks" in caplog.text


def test_a_workdir_belongs_to_one_run_until_it_is_closed(tmp_path):
    first, second = Workdir(tmp_path, keep=1), Workdir(tmp_path, keep=1)
    first.hold()
    first.hold()
    with pytest.raises(ConfigError, match=rf"^workdir {tmp_path} is in use by another run; nothing .* \(process "):
        second.hold()
    first.close()
    second.hold()
    second.close()


@pytest.mark.parametrize("name", ["starts.json", "run_config.json", "checkpoints"])
def test_what_is_in_the_way_in_a_workdir_is_named(tmp_path, name):
    if name == "checkpoints":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name / "folder").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"^(workdir )?{tmp_path}\S* cannot be (made|read|written): ") as refusal:
        Workdir(tmp_path, keep=1).write_run_config(RunConfig(name="x"))
    assert "\n" not in str(refusal.value)
    assert "Errno" not in str(refusal.value)


def test_only_process_0_of_a_run_locks(tmp_path, monkeypatch):
    """The processes of one run must not refuse each other."""
    first, second = Workdir(tmp_path, keep=1), Workdir(tmp_path, keep=1)
    first.hold()
    monkeypatch.setattr("jax.process_index", lambda: 1)
    second.hold()
    monkeypatch.undo()
    first.close()


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old ä", "new ß"), ("wb", b"old", b"new")])
@pytest.mark.parametrize("kind", [Path, epath.Path])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, kind, mode, old, new):
    path = kind(tmp_path) / "a.json"
    with atomic_write(path, mode) as file:
        file.write(old)

    def fail_halfway() -> None:
        with atomic_write(path, mode) as file:
            file.write(new)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    read = path.read_bytes if "b" in mode else lambda: path.read_bytes().decode("utf-8")
    assert read() == old
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    with atomic_write(path, mode) as file:
        file.write(new)
        assert read() == old
    assert read() == new
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_json_is_written_as_text_in_a_folder_that_need_not_be_there(tmp_path):
    write_json(tmp_path / "made" / "a.json", {"ä": [1, None]})
    assert (tmp_path / "made" / "a.json").read_text(encoding="utf-8") == '{\n "ä": [\n  1,\n  null\n ]\n}'
    with pytest.raises(TypeError):
        write_json(tmp_path / "made" / "a.json", {1, 2})
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["a.json"]
