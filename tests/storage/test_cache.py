"""The cache of a bucket's files: never above its limit, whole or not there, whoever uses it at the same time."""

import os
import pickle
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import cache as cache_module
from baichuan_omni_jax.storage.cache import FileCache, RemoteFile, describe_file, list_files
from tests.helpers.bucket import bucket_server, in_this_process
from tests.helpers.faulty_proxy import faulty_proxy
from tests.helpers.micro import REPOSITORY


def content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


@pytest.fixture
def bucket(monkeypatch) -> fsspec.AbstractFileSystem:
    """A bucket in this process' memory."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.setattr(cache_module, "_client", lambda url: memory)
    return memory


def put(bucket: fsspec.AbstractFileSystem, number: int, size: int) -> RemoteFile:
    bucket.pipe_file(f"/bucket/{number}", content(number, size))
    return RemoteFile(f"memory://bucket/{number}", size, str(number))


def used(folder: Path) -> int:
    """Bytes of what is there, as a disk counts them."""
    total = 0
    for path in folder.iterdir() if folder.exists() else []:
        if not path.name.startswith("."):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


SIZES = [0, 1, 100, 700, 999, 1000]


@given(reads=st.lists(st.integers(0, len(SIZES) - 1), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_order_of_reads_stays_within_the_limit(reads, tmp_path_factory):
    memory = fsspec.filesystem("memory")
    cache = FileCache(tmp_path_factory.mktemp("cache"), 1000, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_client", lambda url: memory)
        files = [put(memory, number, size) for number, size in enumerate(SIZES)]
        for number in reads:
            assert cache.read(files[number]) == content(number, SIZES[number])
            assert used(cache.folder) <= 1000
            assert (cache.folder / files[number].key).exists()


def test_what_was_not_used_for_longest_goes_first(bucket, tmp_path):
    cache = FileCache(tmp_path / "cache", 1000)
    files = [put(bucket, number, 300) for number in range(4)]
    for file in files[:3]:
        cache.read(file)
    time.sleep(0.01)
    cache.read(files[0])
    cache.read(files[3])
    there = {file.url for file in files if (cache.folder / file.key).exists()}
    assert files[0].url in there
    assert files[3].url in there
    assert files[1].url not in there


def test_what_is_being_read_stays_and_others_wait_for_room(bucket, tmp_path):
    cache = FileCache(tmp_path / "cache", 1000, 0.5)
    first, second = put(bucket, 1, 900), put(bucket, 2, 900)
    with cache.hold(first) as path:
        with pytest.raises(StorageError, match=r"no room for memory://bucket/2 \(900 bytes\).*raise data.cache_gb"):
            cache.read(second)
        assert path.read_bytes() == content(1, 900)
    assert cache.read(second) == content(2, 900)
    with pytest.raises(ConfigError, match=r"memory://bucket/3 has 1,001 bytes, more than the cache"):
        cache.read(put(bucket, 3, 1001))


def test_an_evicted_file_takes_no_room_where_somebody_has_it_open(bucket, tmp_path):
    cache = FileCache(tmp_path / "cache", 1000)
    first = put(bucket, 1, 900)
    with cache.hold(first) as path:
        file = path.open("rb")
    cache.read(put(bucket, 2, 900))
    assert os.fstat(file.fileno()).st_size == 0
    file.close()


def test_damaged_on_the_way_fetched_again_then_refused(bucket, tmp_path, monkeypatch):
    import base64
    import hashlib

    put(bucket, 1, 500)
    digest = base64.b64encode(hashlib.md5(content(1, 500)).digest()).decode()
    file = RemoteFile("memory://bucket/1", 500, "1", md5=digest)
    read, wrong = bucket.cat_file, [True]
    monkeypatch.setattr(
        bucket, "cat_file", lambda *args, **kw: bytes(500) if wrong and wrong.pop() else read(*args, **kw)
    )
    assert FileCache(tmp_path / "a", 1000).read(file) == content(1, 500)
    monkeypatch.setattr(bucket, "cat_file", lambda *args, **kw: bytes(500))
    cache = FileCache(tmp_path / "b", 1000)
    with pytest.raises(StorageError, match="arrives with another checksum"):
        cache.read(file)
    assert used(cache.folder) == 0
    assert sorted(path.name for path in cache.folder.iterdir()) == [".bytes", ".fetching"]


def test_a_file_that_is_gone_leaves_nothing(bucket, tmp_path):
    cache = FileCache(tmp_path / "cache", 1000)
    with pytest.raises(FileNotFoundError):
        cache.read(RemoteFile("memory://bucket/none", 10, "1"))
    assert used(cache.folder) == 0
    assert cache.read(put(bucket, 1, 1000)) == content(1, 1000)


# Reads files of a folder of this machine, which plays the bucket, at random.
HAMMER = """
import random, sys, threading
from pathlib import Path
import fsspec
from baichuan_omni_jax.storage import cache as module
from baichuan_omni_jax.storage.cache import FileCache, RemoteFile
module._client = lambda url: fsspec.filesystem("file")
bucket, folder, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
files = [RemoteFile(str(path), path.stat().st_size, "1") for path in sorted(bucket.iterdir())]
cache = FileCache(folder, 400_000, 60.0)
def work(number):
    rng = random.Random(seed * 10 + number)
    for _ in range(60):
        file = rng.choice(files)
        assert cache.read(file) == Path(file.url).read_bytes(), file
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
failed = []
threading.excepthook = lambda args: failed.append(repr(args.exc_value))
[t.start() for t in threads]; [t.join() for t in threads]
assert not failed, failed
"""


def test_processes_and_threads_share_a_cache_that_never_exceeds_its_limit(tmp_path):
    source, folder = tmp_path / "bucket", tmp_path / "cache"
    source.mkdir()
    rng = random.Random(0)
    for number in range(30):
        (source / f"{number}").write_bytes(rng.randbytes(rng.randrange(1000, 60_000)))
    # One that was killed while it fetched: what it left is found and removed.
    folder.mkdir()
    (folder / f"{'0' * 40}.90000.1-1.partial").write_bytes(bytes(50_000))
    most, done, cache = 0, threading.Event(), FileCache(folder, 400_000)

    def watch():
        nonlocal most
        while not done.is_set():
            # With the count locked nothing comes or goes while the sizes are added up.
            with cache._counted():
                most = max(most, used(folder))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    command = [sys.executable, "-c", HAMMER, str(source), str(folder)]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    processes = [subprocess.Popen([*command, str(n)], env=variables, stderr=subprocess.PIPE) for n in range(3)]
    errors = [process.communicate()[1] for process in processes]
    done.set()
    watcher.join()
    assert [process.returncode for process in processes] == [0] * 3, errors
    assert 100_000 < most <= 400_000
    assert not list(folder.glob("*.partial"))


def test_a_cache_is_sent_to_workers():
    cache = FileCache(Path("/tmp/x"), 10, 1.0)
    assert pickle.loads(pickle.dumps(cache)) == cache


def test_from_a_server_that_refuses_and_drops_requests(tmp_path, monkeypatch):
    with bucket_server() as server, faulty_proxy(server.url, refused=0.2, dropped=0.1) as proxy:
        with in_this_process(server):
            fsspec.filesystem("gs").pipe({f"bucket/set/{n}": content(n, 5000) for n in range(10)})
            fsspec.filesystem("gs").pipe_file("bucket/set/below/a", b"a")
        for name, value in server.variables(proxy.url).items():
            monkeypatch.setenv(name, value)
        import gcsfs

        gcsfs.GCSFileSystem.clear_instance_cache()
        cache = FileCache(tmp_path / "cache", 20_000, 60.0)
        files = list_files("gs://bucket/set")
        assert sorted(files) == [str(n) for n in range(10)]
        assert "below/a" in list_files("gs://bucket/set", below=True)
        for number in range(10):
            assert cache.read(files[str(number)]) == content(number, 5000)
            assert used(cache.folder) <= 20_000
        assert files["1"].crc32c
        assert describe_file("gs://bucket/set/1") == files["1"] == cache.describe("gs://bucket/set/1")
        with pytest.raises(FileNotFoundError):
            describe_file("gs://bucket/set/none")
        assert proxy.faults
        gcsfs.GCSFileSystem.clear_instance_cache()
