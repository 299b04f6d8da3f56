"""A data root in a bucket: what of it lies on this machine, where, and how it gets there and back.

    CACHE/files/              shards and media that were read, of bounded size (`storage.cache`)
    CACHE/data/ROOT-KEY/      what a folder has in its `.cache`: indexes, tokenizer, manifests, codes that are made
    gs://BUCKET/ROOT/.cache/  indexes, tokenizer and audio codes, for all machines: what one built the others fetch

CACHE is `data.cache`, else `$XDG_CACHE_HOME/baichuan_omni_jax` or `~/.cache/baichuan_omni_jax`.
"""

import base64
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import google_crc32c
from etils import epath

from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage import PATIENCE, cache_home, is_url, local_path, parse_path, patiently, remove, take_lock
from baichuan_omni_jax.storage.cache import GIB, FileCache, RemoteFile, describe_file, fetch_file, list_files

log = logging.getLogger(__name__)
_THREADS = 8  # files under way at a time


def _cache(config: DataConfig) -> Path:
    return local_path(config.cache, "data.cache").absolute() if config.cache else cache_home()


def file_cache(config: DataConfig) -> FileCache:
    """Returns the cache that a run's shards and media are read through."""
    if config.cache_gb <= 0:
        raise ConfigError(f"data.cache_gb {config.cache_gb:g} must be above 0")
    return FileCache(_cache(config) / "files", int(config.cache_gb * GIB), config.patience)


def cache_folder(config: DataConfig) -> Path:
    """Returns where tokenizer, indexes and codes of a data root are kept: in it, or beside the cache for a URL."""
    root = parse_path(config.root)
    if not is_url(root):
        return Path(root) / ".cache"
    return _cache(config) / "data" / hashlib.sha256(os.fspath(root).encode()).hexdigest()[:16]


def shared_path(config: DataConfig, path: Path) -> epath.Path | None:
    """Returns the place in the bucket of what lies at `path` in the cache folder; None where the root is a folder."""
    root = parse_path(config.root)
    return root / ".cache" / path.relative_to(cache_folder(config)).as_posix() if is_url(root) else None


def fetch_shared(config: DataConfig, path: Path, last: str = "") -> None:
    """Fetches what another machine built and shared, where this one lacks it.

    Args:
        config: of the run.
        path: a file in the cache folder, or with `last` a folder.
        last: the file of a folder that says that it is whole.

    Raises:
        StorageError: the bucket does not answer.
    """
    remote = shared_path(config, path)
    if remote is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of the processes of a machine one fetches.
    lock = take_lock(path.with_name(f"{path.name}.lock"), "", wait=True)
    try:
        mark = remote / last if last else remote
        if not path.exists() and patiently(mark.exists, f"looking for {mark}", config.patience):
            log.info("fetching %s", remote)
            download(remote, path, config.patience)
    finally:
        lock.release()


def share(config: DataConfig, path: Path, last: str = "") -> None:
    """Copies what was built here into the bucket, `last` at the end; one that may not be written costs a warning."""
    remote = shared_path(config, path)
    if remote is None:
        return
    try:
        upload(path, remote, last, config.patience)
    except (OSError, StorageError) as error:
        log.warning("%s stays on this machine alone: %s", path.name, error)


def manifest_copy(config: DataConfig, name: str, file: RemoteFile) -> Path:
    """Returns a folder of this machine with the manifest `name` of the bucket, fetched once for each version of it."""
    folder = cache_folder(config) / "manifests" / file.key[:16]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(path.with_name(f"{path.name}.lock"), "", wait=True)
    try:
        if not path.exists():
            _fetch({path: file}, config.patience)
    finally:
        lock.release()
    return folder


def download(source: epath.Path, target: Path, patience: float = PATIENCE) -> None:
    """Copies a file, or every file below a folder, to `target`: whole or not at all.

    Raises FileNotFoundError where there is nothing, ConfigError where `target` cannot be written, StorageError.
    """
    below = list_files(source, patience, below=True)
    if not below:
        _fetch({target: describe_file(os.fspath(source), patience)}, patience)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _fetch({temporary / name: file for name, file in below.items()}, patience)
        temporary.rename(target)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upload(source: Path, target: epath.Path, last: str = "", patience: float = PATIENCE) -> None:
    """Copies a file, or every file below a folder, into the bucket; `last`, a file's name, after all others.

    What is there and has the same size and checksum is not sent again. Raises StorageError, or OSError where the
    bucket refuses it.
    """
    if source.is_file():
        _send(target, source, patience)
        return
    # Names with a dot are those of a work in progress: locks, marks, listings.
    found = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    names = sorted(name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts))
    there = list_files(target, patience, below=True)
    _in_threads(
        partial(_send, target / name, source / name, patience)
        for name in names
        if name != last and not _is_same(source / name, there.get(name))
    )
    if last:
        _send(target / last, source / last, patience)


def exchange(
    path: Path,
    remote: epath.Path,
    on_all_hosts: Callable[[Callable[[], None]], object],
    patience: float,
    folder: Path,
    names: Sequence[str],
) -> None:
    """Gives every host what all hosts have written into `folder`, by way of the bucket. Every host must call it.

    Args:
        path: a folder of this machine, for the same use on every host.
        remote: its place in the bucket.
        on_all_hosts: does work on every host; returns when all have done it, and raises on all what one raised.
        patience: seconds for which storage is tried.
        folder: part of `path`.
        names: what this host has written there; what vouches for others comes after them.
    """
    there = remote / folder.relative_to(path).as_posix()

    def send() -> None:
        for name in names:
            _send(there / name, folder / name, patience)

    def fetch() -> None:
        files = list_files(there, patience, below=True)
        others = {name: file for name, file in files.items() if name not in names}
        changed = {name: file for name, file in others.items() if not _has(folder / name, file)}
        _fetch({folder / name: file for name, file in changed.items()}, patience)

    on_all_hosts(send)
    on_all_hosts(fetch)


def _has(path: Path, file: RemoteFile) -> bool:
    return path.exists() and _is_same(path, file)


def remove_marks(remote: epath.Path, patience: float = PATIENCE) -> None:
    """Removes what `exchange` has left in the bucket beside the files of the finished work."""
    for name in list_files(remote, patience, below=True):
        if any(part.startswith(".") for part in name.split("/")):
            remove(remote / name)


def _send(target: epath.Path, source: Path, patience: float) -> None:
    patiently(lambda: target.write_bytes(source.read_bytes()), f"writing {target}", patience)


def _is_same(path: Path, file: RemoteFile | None) -> bool:
    """Tells whether a file of the bucket has the size and the checksum of the file at `path`."""
    if file is None or not file.crc32c or path.stat().st_size != file.size:
        return False
    digest = google_crc32c.Checksum()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return base64.b64encode(digest.digest()).decode() == file.crc32c


def _fetch(files: dict[Path, RemoteFile], patience: float) -> None:
    """Fetches files, each whole or not at all."""

    def one(path: Path, file: RemoteFile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial_path.open("wb") as target:
                fetch_file(file, target.fileno(), patience)
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)

    _in_threads(partial(one, path, file) for path, file in files.items())


def _in_threads(work: Iterable[partial]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for future in [pool.submit(each) for each in work]:
            future.result()
