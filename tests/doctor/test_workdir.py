"""The workdir's probe: what it finds, on real file systems where they can be mounted, and that it leaves nothing."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from baichuan_omni_jax.doctor import Line, Setting, Verdict, workdir
from baichuan_omni_jax.doctor.workdir import check_workdir
from tests.helpers.bucket import bucket_server, in_this_process
from tests.helpers.service import hosts_that_say


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(workdir, "PROBE_BYTES", 4 * 2**20)
    monkeypatch.setattr(workdir, "_PIECE", 2**20)
    # How fast this machine's disk is today is no matter of the tests.
    monkeypatch.setattr(workdir, "SLOW", 0.0)


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system with options at a folder; skips where that is not allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("file systems may not be mounted here")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def failures(place: object) -> list[Line]:
    return [line for line in check_workdir(Setting(workdir=str(place))) if line.verdict is not Verdict.OK]


def test_a_good_folder_passes_and_is_left_as_it_was(tmp_path):
    (tmp_path / "run.txt").write_text("kept")
    lines = list(check_workdir(Setting(workdir=str(tmp_path))))
    assert {line.verdict for line in lines} == {Verdict.OK}
    assert any("folders can be renamed" in line.text for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["run.txt"]


def test_folders_that_were_not_there_are_gone_again(tmp_path):
    assert not failures(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_could_be_made_in_part_are_gone_again(tmp_path):
    (line,) = failures(tmp_path / "a" / ("b" * 300))
    assert "cannot be made: File name too long" in line.text
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_workdir_is_named(mounted):
    folder = mounted("ro")
    (line,) = failures(folder)
    assert line.verdict is Verdict.FAIL
    assert line.text == f"{folder} cannot be written: Read-only file system"


def test_a_workdir_that_refuses_files_is_named(tmp_path, monkeypatch):
    """As above, where nothing can be mounted."""

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(workdir, "write_probe", refuse)
    (line,) = failures(tmp_path)
    assert line.text == f"{tmp_path} cannot be written: Read-only file system"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_is_not_left_full(mounted):
    folder = mounted("size=1m")
    (line,) = failures(folder)
    assert (line.verdict, line.advice) == (Verdict.FAIL, "make room, or name another workdir")
    assert line.text == f"{folder} cannot be written: No space left on device"
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_is_named(tmp_path, monkeypatch):
    """As above, where nothing can be mounted: the last piece does not fit."""
    write = workdir.write_probe

    def fill(path, data, size):
        write(path, data, size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(workdir, "write_probe", fill)
    (line,) = failures(tmp_path)
    assert line.text == f"{tmp_path} cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_rename_folders_is_named(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    (line,) = failures(tmp_path)
    assert line.verdict is Verdict.WARN
    assert "folders cannot be renamed; a checkpoint is committed by a file that is written last" in line.text
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_passes_and_is_left_empty():
    with bucket_server() as server, in_this_process(server):
        lines = list(check_workdir(Setting(workdir="gs://bucket/run")))
        assert [line.verdict for line in lines] == [Verdict.OK, Verdict.OK]
        assert server.names() == []
        # Of no bucket at all.
        (line,) = failures("gs://nobody/run")
        assert line.verdict is Verdict.FAIL
        assert line.text.startswith("gs://nobody/run cannot be written: ")


def test_bytes_that_come_back_otherwise_are_no_place_for_checkpoints(tmp_path, monkeypatch):
    write = workdir.write_probe

    def damage(path, data, size):
        write(path, data, size)
        with Path(path).open("r+b") as file:
            file.seek(size // 2 + 100)
            file.write(b"\0" * 8)

    monkeypatch.setattr(workdir, "write_probe", damage)
    (line,) = failures(tmp_path)
    assert line.text == f"{tmp_path}: what was read is not what was written"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("foo://bucket/run", "foo:// cannot be read or written; a path, gs:// and s3:// can"),
        ("gs:/bucket/run", "looks like a URL that lost a slash"),
        ("/proc/nothing/run", "/proc/nothing/run cannot be made: "),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_no_folder(url, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = failures(url)
    assert line.verdict is Verdict.FAIL
    assert words in line.text
    assert list(tmp_path.iterdir()) == []


def test_without_a_workdir_nothing_is_tried():
    (line,) = check_workdir(Setting())
    assert "give --workdir" in line.text


def test_hosts_of_different_workdirs_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "SEEN_SECONDS", 0.3)
    hosts = hosts_that_say("seen", ".doctor-seen-1-99")
    (line,) = [line for line in check_workdir(Setting(str(tmp_path), hosts=hosts)) if line.verdict is Verdict.FAIL]
    assert line.text == f"{tmp_path}: files of host 1 are not to be seen on this host"
    (tmp_path / ".doctor-seen-1-99").touch()
    assert not [line for line in check_workdir(Setting(str(tmp_path), hosts=hosts)) if line.verdict is Verdict.FAIL]


def test_a_host_without_a_workdir_keeps_no_other_waiting(tmp_path):
    """It says so to them at every place where they wait; they do not look for its files."""
    hosts = hosts_that_say("seen", "")
    (line,) = check_workdir(Setting(hosts=hosts))
    assert line.verdict is Verdict.OK
    assert {key for key in hosts._client.told if key.endswith("/0")} == {
        f"told/{name}/0" for name in ("seen", "looked", "left")
    }
    lines = list(check_workdir(Setting(str(tmp_path), hosts=hosts)))
    assert not [line for line in lines if line.verdict is not Verdict.OK]
