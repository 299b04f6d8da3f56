"""What a user may give as a path, and what becomes of it; file systems and buckets that refuse."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.storage import (
    MirroredFolder,
    atomic_write,
    check_writable,
    local_path,
    may_pass,
    parse_path,
    paths,
    read_json_object,
    remove,
    renames_folders,
    with_retries,
    write_json,
)
from tests.helpers.bucket import BucketServer, bucket_server, in_this_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server, in_this_process(server):
        yield server


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "error: /a/b: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"), 2, "error: /b: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device"),
        (OSError("HttpError: 503"), 1, "error: HttpError: 503"),
        (OSError("Forbidden: https://storage/b\nno such account"), 2, "error: Forbidden: https://storage/b"),
        (TimeoutError(), 1, "error: TimeoutError"),
    ],
)
def test_whatever_storage_refuses_a_command_is_one_sentence(error, code, sentence, capsys):
    """1 for what another start may find mended, which a supervisor tries; 2 for what stays."""

    def command():
        raise error

    assert exit_code(command) == code
    assert capsys.readouterr().err == f"{sentence}\n"


def test_a_path_of_a_file_system_is_absolute_and_without_links(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = str(tmp_path.resolve() / "real" / "a")
    for text in ("link/a", "./real/../real/a", "~/link/a", f"file://{tmp_path}/link/a"):
        assert os.fspath(parse_path(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/run", "ftp:// cannot be read or written"),
        ("https://host/run", "https:// cannot be read or written"),
        ("gs://", "is not gs://BUCKET/PATH"),
        ("gs:///run", "is not gs://BUCKET/PATH"),
        ("gs://bucket/../run", "is not gs://BUCKET/PATH"),
        ("gs:/bucket/run", "write gs://bucket/run"),
        ("/home/me/gs:/bucket/run", "write gs://bucket/run"),
        (Path("s3://bucket/run"), "write s3://bucket/run"),
        ("", "was a variable of the shell not set?"),
        ("  ", "was a variable of the shell not set?"),
        ("~nobody-of-this-name/run", "there is no user of the name ~nobody-of-this-name"),
        ("run\0", "has a zero byte"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(text, message):
    with pytest.raises(ConfigError) as refusal:
        parse_path(text)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_package_is_named_with_its_extra(scheme, package, extra, monkeypatch):
    monkeypatch.setattr(paths, "find_spec", lambda name: None)
    monkeypatch.setattr(paths, "_ready", set())
    with pytest.raises(ConfigError, match=rf"needs the package {package}: .*baichuan_omni_jax\[{extra}\]"):
        parse_path(f"{scheme}://bucket/run")


@pytest.mark.parametrize("url", ["gs://bucket/a", Path("gs://bucket/a"), "file:///tmp/a", "hf://org/a"])
def test_where_a_folder_is_needed_a_url_is_refused(url):
    with pytest.raises(ConfigError, match=r"^data\.root .* is a URL"):
        local_path(url, "data.root")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "configs/micro.py", "--workdir", "webdav://host/run"],
        ["train", "--config", "configs/micro.py", "--workdir", "run", "--set", "data.trusted_roots=('gs://bucket/a',)"],
        ["data", "build", "hdfs://host/text.jsonl", "--out", "shards"],
        ["data", "build", "text.jsonl", "--out", "shards", "--trust", "gs://bucket/media"],
        ["convert", "to-qwen2", "--from", "gs:/bucket/converted", "--to", "qwen2"],
    ],
)
def test_a_command_makes_no_folder_of_a_url(arguments, tmp_path):
    arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
    command = [sys.executable, "-m", "baichuan_omni_jax", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(paths, "_PAUSE", 0.0)
    errors = [OSError(errno.EIO, "Input/output error"), TimeoutError(errno.ETIMEDOUT, "timed out")]

    def work() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert with_retries(work, "working") == "done"


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x"), OSError(errno.ENOSPC, "x"), KeyError("x")])
def test_what_will_not_pass_is_raised_at_once(error):
    calls = []

    def work() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(work, "working")
    assert calls == [1]


def test_a_file_system_that_renames_no_folders_is_found_out(tmp_path, monkeypatch):
    assert renames_folders(tmp_path)
    rename = os.rename

    def refuse(source, target, **options):
        if os.path.isdir(source):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    assert not renames_folders(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_is_written_whole_or_not_at_all(server: BucketServer):
    path = parse_path("gs://bucket/files/a.json")
    write_json(path, {"ä": 1})

    def fail_halfway() -> None:
        with atomic_write(path) as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert read_json_object(path) == {"ä": 1}
    assert server.names("files/") == ["files/a.json"]


@pytest.mark.parametrize("kind", ["bucket", "file system"])
def test_files_and_folders_are_removed_and_what_is_not_there_is_as_good(server: BucketServer, tmp_path, kind):
    place = parse_path("gs://bucket/removed" if kind == "bucket" else tmp_path)
    for name in ("a", "b/c/d", "b/e"):
        write_json(place / name, {})
    remove(place / "a")
    remove(place / "b")
    remove(place / "b")
    assert not (place / "a").exists()
    assert not (place / "b").exists()


def test_a_deletion_whose_answer_was_lost_is_done(tmp_path, monkeypatch):
    """The client asks again, and is told that there is nothing to delete."""
    path = parse_path(tmp_path / "a")
    path.write_text("")

    def unlink(self, missing_ok=False) -> None:
        os.unlink(self)
        raise OSError("No such object")

    monkeypatch.setattr(type(path), "unlink", unlink)
    remove(path)
    assert not path.exists()


def test_a_bucket_that_is_not_there_is_named(server: BucketServer):
    check_writable(parse_path("gs://bucket/run"), "workdir")
    assert server.names("run/") == []
    with pytest.raises(ConfigError, match=r"^workdir gs://nobody/run cannot be written"):
        check_writable(parse_path("gs://nobody/run"), "workdir")


def test_growing_files_are_copied_and_what_was_removed_goes(server: BucketServer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    location = parse_path("gs://bucket/grown")
    (location / "metrics.jsonl").write_text("old\n")
    folder = MirroredFolder(location, "host_0", fetch=("metrics.jsonl", "goodput.json"))
    assert [path.name for path in folder.path.iterdir()] == ["metrics.jsonl"]
    with open(folder.path / "metrics.jsonl", "a") as file:
        for line in ("one\n", "two\n"):
            file.write(line)
            file.flush()
            (folder.path / "kept" / line.strip()).mkdir(parents=True)
            (folder.path / "kept" / line.strip() / "a.npz").write_bytes(b"a")
            folder.sync()
    assert server.read("grown/metrics.jsonl") == b"old\none\ntwo\n"
    (folder.path / "kept" / "one" / "a.npz").unlink()
    folder.close()
    assert server.names("grown/") == ["grown/kept/two/a.npz", "grown/metrics.jsonl"]
    assert not folder.path.exists()


def test_on_a_file_system_the_folder_is_the_workdir(tmp_path):
    folder = MirroredFolder(parse_path(tmp_path), "host_0", fetch=("metrics.jsonl",))
    assert folder.path == tmp_path
    assert folder.sync()
    folder.close()
    assert tmp_path.is_dir()


def test_what_is_not_allowed_is_not_tried_again():
    retry = pytest.importorskip("gcsfs.retry", reason="buckets need gcsfs (extra gcs)")
    for code, passes in ((403, False), (401, False), (412, False), (429, True), (503, True), (500, True)):
        assert may_pass(retry.HttpError({"code": code, "message": "no"})) == passes
    assert not may_pass(OSError("Forbidden: bucket/a"))  # as gcsfs says it
    assert may_pass(OSError(errno.EIO, "Input/output error"))
    assert not may_pass(FileNotFoundError(errno.ENOENT, "gone"))
    assert not may_pass(ValueError("no storage"))
