"""A cache of a bucket's files on this machine: of bounded size, shared by all processes of the host.

    FOLDER/KEY                          a whole file; its time of change is when it was last used
    FOLDER/KEY.BYTES.PROCESS.partial    one that is being fetched, which will have so many bytes
    FOLDER/.bytes                       the bytes of all of these, or more; locked by whoever changes it
    FOLDER/.fetching/NNN                locks: of two processes that want the same file one fetches it

Room is made before a file is begun, so that the folder never holds more than its limit. What was not used for longest
goes first, but nothing that is being read: who reads holds a shared lock of the file. An evicted file is cut to nothing
as well, since a process that has it open would keep its bytes on the disk.

Keys are of address and version: an object that is written anew is another file, and the old one is forgotten in time.
"""

import base64
import errno
import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import google_crc32c
from etils import epath

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage.paths import parse_path
from baichuan_omni_jax.storage.reads import PATIENCE, patiently

log = logging.getLogger(__name__)

GIB = 1 << 30
_BLOCK = 16 << 20  # bytes of one request
_SYNCED = 1 << 20
_SPARE = 16  # when room is made, one part in so many more is
_PAUSE = 0.1  # seconds between two looks for room
_AHEAD = 4096  # files that may wait to be fetched ahead; more are left to their readers


@dataclass(frozen=True)
class RemoteFile:
    """A file in a bucket as its store describes it; `crc32c` and `md5` are in base64, "" where the store has none."""

    url: str
    size: int
    version: str
    crc32c: str = ""
    md5: str = ""

    @property
    def key(self) -> str:
        """The name of its copy in a cache."""
        return hashlib.sha256(f"{self.url}\0{self.version}\0{self.size}".encode()).hexdigest()[:40]


def describe_file(url: str, patience: float = PATIENCE) -> RemoteFile:
    """Asks the store for a file. Raises FileNotFoundError where there is none, StorageError."""
    info = patiently(lambda: _client(url).info(url), f"looking at {url}", patience)
    if info.get("type") != "file":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return _described(url, info)


def list_files(folder: epath.PathLike, patience: float = PATIENCE, *, below: bool = False) -> dict[str, RemoteFile]:
    """Lists the files of a folder by name; with `below` those of its folders too, by path. Raises StorageError."""
    url = os.fspath(folder).rstrip("/")
    client, depth = _client(url), None if below else 1
    look = lambda: client.find(url, maxdepth=depth, detail=True)  # noqa: E731
    top = f"{client._strip_protocol(url)}/"
    found = patiently(look, f"listing {url}", patience).items()
    names = {name.removeprefix(top): info for name, info in found if name.startswith(top) and info["type"] == "file"}
    return {name: _described(f"{url}/{name}", info) for name, info in sorted(names.items()) if name}


def fetch_file(file: RemoteFile, descriptor: int, patience: float = PATIENCE) -> None:
    """Writes a file to an open one of this machine, and compares size and checksum with what the store says.

    Raises FileNotFoundError where it is gone, StorageError where it cannot be fetched or arrives changed.
    """
    client = _client(file.url)

    def block(start: int, stop: int) -> bytes:
        data = client.cat_file(file.url, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} of {stop - start} bytes arrived")
        return data

    for _ in range(2):
        digest = google_crc32c.Checksum() if file.crc32c else hashlib.md5(usedforsecurity=False)
        for start in range(0, file.size, _BLOCK):
            stop = min(start + _BLOCK, file.size)
            data = patiently(lambda start=start, stop=stop: block(start, stop), f"reading {file.url}", patience)
            digest.update(data)
            os.pwrite(descriptor, data, start)
        expected = file.crc32c or file.md5
        if not expected or base64.b64encode(digest.digest()).decode() == expected:
            return
        log.warning("%s arrived with another checksum than its store names: fetched again", file.url)
    raise StorageError(f"{file.url} arrives with another checksum than its store named: it was damaged, or replaced")


def _client(url: str) -> Any:
    parse_path(url)  # makes its scheme ready, in a worker too
    return fsspec.filesystem(url.partition("://")[0])


def _described(url: str, info: dict) -> RemoteFile:
    # As gcsfs and s3fs name them. S3's ETag is no checksum where an object was encrypted or sent in parts.
    version = str(info.get("generation") or info.get("etag") or info.get("ETag") or info.get("LastModified") or "")
    return RemoteFile(url, int(info["size"]), version, info.get("crc32c") or "", info.get("md5Hash") or "")


@dataclass(frozen=True)
class FileCache:
    """The cache in `folder`. Picklable; any number of processes and threads may use one folder, with limits of their
    own.

    Args:
        folder: made where it is not there.
        limit: bytes that it holds at most.
        patience: seconds for which what storage refuses, and room, are tried for.
    """

    folder: Path
    limit: int
    patience: float = PATIENCE
    _known: dict[str, RemoteFile] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple:
        return FileCache, (self.folder, self.limit, self.patience)

    def describe(self, url: str) -> RemoteFile:
        """Describes a file as `describe_file`, asked once a process."""
        if url not in self._known:
            self._known[url] = describe_file(url, self.patience)
        return self._known[url]

    @contextmanager
    def hold(self, file: RemoteFile) -> Iterator[Path]:
        """Gives the file on this machine, fetched where it is not there; it is not evicted while the block runs.

        Raises ConfigError for one that is larger than the limit, FileNotFoundError for one that is gone, StorageError
        where it cannot be fetched, or there was no room for so long.
        """
        if file.size > self.limit:
            raise ConfigError(
                f"{file.url} has {file.size:,} bytes, more than the cache {self.folder} may hold ({self.limit:,}): "
                "raise data.cache_gb"
            )
        path = self.folder / file.key
        while (descriptor := _take(path, file.size)) is None:
            self._fetch(file, path)
        try:
            yield path
        finally:
            os.close(descriptor)

    def read(self, file: RemoteFile) -> bytes:
        """Returns the contents of a file. Raises as `hold`."""
        with self.hold(file) as path:
            return path.read_bytes()

    def _fetch(self, file: RemoteFile, path: Path) -> None:
        with self._locked(f".fetching/{file.key[:3]}"):
            if path.exists():
                return
            try:
                partial, descriptor = self._begin(file)
            except OSError as error:
                raise StorageError(f"the cache {self.folder} cannot be written: {error.strerror}") from error
            try:
                fetch_file(file, descriptor, self.patience)
                # What a power failure would leave of a small file costs less to fetch again than to wait for.
                if file.size >= _SYNCED:
                    os.fsync(descriptor)
                # Names change while nobody counts: a file that vanished from a list would be taken for removed.
                with self._counted():
                    partial.rename(path)
            except BaseException as error:
                with self._counted() as count:
                    # Gone and not counted at once: whoever counts anew in between would count it out twice.
                    partial.unlink(missing_ok=True)
                    os.ftruncate(descriptor, 0)
                    count(-file.size)
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise StorageError(f"the cache {self.folder} cannot be written: {error.strerror}") from error
                raise
            finally:
                os.close(descriptor)

    def _begin(self, file: RemoteFile) -> tuple[Path, int]:
        """Waits for room and takes it: returns the file to write, and its descriptor, locked."""
        partial = self.folder / f"{file.key}.{file.size}.{os.getpid()}-{threading.get_ident()}.partial"
        end = time.monotonic() + self.patience
        while True:
            with self._counted() as count:
                if count(0) + file.size <= self.limit or self._evict(file.size, count):
                    # Counted and there before the lock is released: nobody takes the same room.
                    count(file.size)
                    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    return partial, descriptor
            if time.monotonic() > end:
                raise StorageError(
                    f"the cache {self.folder} has no room for {file.url} ({file.size:,} bytes): "
                    f"all of its {self.limit:,} are being read; raise data.cache_gb"
                )
            time.sleep(_PAUSE)

    def _evict(self, size: int, count: Callable[[int], int]) -> bool:
        """Counts anew what is there and removes what was not used for longest; returns whether `size` bytes fit."""
        files = self._files()
        total = sum(bytes_ for _, _, bytes_, _ in files)
        # Fetching what is not there costs a look at all files: more room than is asked for is made at once. What
        # killed processes left unfinished goes first.
        for _, _, bytes_, path in sorted(files):
            if total + size <= self.limit - self.limit // _SPARE:
                break
            if _remove_unless_held(path):
                total -= bytes_
        count(total - count(0))
        return total + size <= self.limit

    def _files(self) -> list[tuple[bool, int, int, Path]]:
        """Lists what is there: whether it is whole, when it was used, its bytes, its path."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    parts = entry.name.split(".")
                    # One that is being fetched takes what it will have.
                    bytes_ = int(parts[1]) if parts[-1] == "partial" else status.st_size
                    files.append((parts[-1] != "partial", status.st_mtime_ns, bytes_, Path(entry.path)))
        return files

    @contextmanager
    def _counted(self) -> Iterator[Callable[[int], int]]:
        """Locks the count of bytes; gives what adds to it and returns it."""
        with self._locked(".bytes") as descriptor:

            def count(change: int) -> int:
                known = os.pread(descriptor, 32, 0)
                # Without a count there may be files all the same: of a process that was killed before it had one.
                total = (int(known) if known else sum(bytes_ for _, _, bytes_, _ in self._files())) + change
                if change or not known:
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, str(total).encode(), 0)
                return total

            yield count

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"the cache {self.folder} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _take(path: Path, size: int) -> int | None:
    """Opens a cached file and locks it against eviction; None where it is not there (any more)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if not status.st_nlink or status.st_size != size:
        # Evicted a moment ago; or cut by a crash of the machine.
        if status.st_nlink:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        return None
    os.utime(descriptor)
    return descriptor


def _remove_unless_held(path: Path) -> bool:
    """Removes a file of the cache and frees its bytes; returns False where it is being read or fetched."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        os.ftruncate(descriptor, 0)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


class Prefetcher:
    """Fetches in threads of this process what will be read soon, in the order in which it is asked for."""

    def __init__(self, threads: int = 4) -> None:
        self._work: queue.Queue[Callable[[], Any]] = queue.Queue(_AHEAD)
        for _ in range(threads):
            threading.Thread(target=self._run, daemon=True, name="prefetch").start()

    def __call__(self, fetch: Callable[[], Any]) -> None:
        """Has `fetch()` done; one that fails is left to whoever reads, and is told there."""
        with suppress(queue.Full):
            self._work.put_nowait(fetch)

    def _run(self) -> None:
        while True:
            fetch = self._work.get()
            try:
                fetch()
            except Exception as error:
                log.debug("fetching ahead failed: %s", error)
