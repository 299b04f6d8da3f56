"""What commands are given by URL: fetched before they begin, copied back while they write and at the end.

    add("--data", type=given_input)         a file or a folder
    add("--manifest", type=given_manifest)  a manifest, with the folder that it lies in: its media lie there
    add("--out", type=given_folder)         a folder that is written, perhaps from where it was left
    add("--json", type=given_file)          a file that is written

Each type gives a `Path` for what is on this machine. A URL becomes one inside `localized`, around the command.

    CACHE/copies/gs/BUCKET/PATH      what was fetched; what did not change since is not fetched again
    CACHE/copies/.fetched/KEY.json   which version of which file that is
    CACHE/workdirs/KEY-out/          what is written, see `mirror`
"""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from etils import epath

from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.storage.cache import RemoteFile, describe_file, fetch_file, list_files
from baichuan_omni_jax.storage.locks import FileLock, take_lock
from baichuan_omni_jax.storage.mirror import MirroredFolder, scratch_folder
from baichuan_omni_jax.storage.paths import cache_home, check_writable, is_url, local_path, parse_path

_THREADS = 8
_SPARE = 1 << 30  # bytes that a disk keeps free
_PATIENCE = 60.0  # seconds: somebody waits for the command


@dataclass(frozen=True)
class GivenUrl:
    """A URL in the place of a path, and what it is for."""

    url: str
    use: Literal["input", "manifest", "folder", "file"]

    def __str__(self) -> str:
        return self.url


def given_input(text: str) -> Path | GivenUrl:
    """A file or a folder that is read."""
    return _given(text, "input")


def given_manifest(text: str) -> Path | GivenUrl:
    """A manifest that is read, or a data set's folder."""
    return _given(text, "manifest")


def given_folder(text: str) -> Path | GivenUrl:
    """A folder that is written."""
    return _given(text, "folder")


def given_file(text: str) -> Path | GivenUrl:
    """A file that is written."""
    return _given(text, "file")


def _given(text: str, use: Literal["input", "manifest", "folder", "file"]) -> Path | GivenUrl:
    # What is no path is refused in `localized`, by the sentence of the command's errors.
    return GivenUrl(text, use) if is_url(text) else Path(text)


@contextmanager
def localized(options: argparse.Namespace) -> Iterator[None]:
    """Gives a command paths of this machine for the URLs among its options, and copies what it wrote to their places.

    Raises:
        ConfigError: a URL cannot be served, is not there or cannot be written; another program writes there; or the
            disk has no room.
        StorageError: storage does not answer. What could not be copied stays on this machine, and the message says
            where.
    """
    with ExitStack() as stack:
        written = []
        for name, value in vars(options).items():
            flag = name.replace("_", "-")
            found = [_localize(each, flag, stack, written) for each in (value if isinstance(value, list) else [value])]
            setattr(options, name, found if isinstance(value, list) else found[0])
        # Which flags were URLs: workers on other machines see nothing of what is written here.
        options.written_by_url = [str(folder.location) for folder in written]
        yield


def _localize(value: object, flag: str, stack: ExitStack, written: list[MirroredFolder]) -> object:
    if isinstance(value, Path):
        return local_path(value, flag)
    if not isinstance(value, GivenUrl):
        return value
    url = parse_path(value.url)
    if not is_url(url):  # file://
        return Path(url)
    if value.use in ("input", "manifest"):
        return local_copy(url, beside=value.use == "manifest")
    # A file is one of a folder that is written.
    folder, name = (url, "") if value.use == "folder" else (url.parent, url.name)
    check_writable(folder, f"--{flag}")
    written.append(stack.enter_context(_output(folder, [name] if name else None)))
    return written[-1].path / name


def local_copy(url: epath.Path, *, beside: bool = False, wanted: Callable[[str], bool] | None = None) -> Path:
    """Returns a copy of a file or a folder of a bucket on this machine; what did not change is not fetched again.

    Args:
        url: the file, or the folder, with all that is below.
        beside: of a file all that lies in its folder is fetched.
        wanted: which files of a folder are fetched, by their paths in it; None: all.

    Returns:
        The copy. Whoever writes to it writes for nobody.

    Raises:
        ConfigError: there is nothing, or the disk has no room for it.
        StorageError: storage does not answer.
    """
    files, name = list_files(url, _PATIENCE, below=True), ""
    if not files:
        url, name = url.parent, url.name
        try:
            files = {name: describe_file(f"{url}/{name}", _PATIENCE)}
        except FileNotFoundError as error:
            raise ConfigError(f"{url}/{name} cannot be read: there is no such file or folder") from error
        files = list_files(url, _PATIENCE, below=True) if beside else files
    part = "" if beside else name
    if wanted is not None:
        # A copy of its own: a whole one would lose the other files by it.
        files, part = {name: file for name, file in files.items() if wanted(name)}, wanted.__name__
    # By the names that they have there: what is made of several manifests is called by their place.
    copies, key = cache_home() / "copies", hashlib.sha256(f"{url} {part}".encode()).hexdigest()[:16]
    folder, state = copies / os.fspath(url).replace("://", "/"), copies / ".fetched" / f"{key}.json"
    try:
        for needed in (folder, state.parent):
            needed.mkdir(parents=True, exist_ok=True)
        lock = take_lock(state.with_suffix(".lock"), "", wait=True)
        try:
            _refresh(folder, files, state)
        finally:
            lock.release()
    except OSError as error:
        raise ConfigError(f"{url} cannot be copied to {folder}: {error.strerror or error}") from error
    return folder / name


def _refresh(folder: Path, files: dict[str, RemoteFile], state: Path) -> None:
    """Fetches what the folder lacks of `files`, and removes what is none of them; `state` is the file that knows."""
    known = json.loads(state.read_text()) if state.is_file() else {}
    wanted = {name: file for name, file in files.items() if known.get(name) != file.key or not (folder / name).exists()}
    needed, free = sum(file.size for file in wanted.values()), shutil.disk_usage(folder).free
    if needed > free - _SPARE:
        raise ConfigError(f"{needed:,} bytes are to be fetched to {folder}, where {free:,} are free")
    for name in [name for name in known if name not in files]:
        (folder / name).unlink(missing_ok=True)

    def fetch(name: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as target:
            fetch_file(wanted[name], target.fileno(), _PATIENCE)
        # The same on every machine: what is built of files goes on where their times are those that it knows.
        version = wanted[name].version
        changed = 1000 * int(version) if version.isdigit() else int(wanted[name].key[:12], 16)
        os.utime(partial, ns=(changed, changed))
        partial.replace(path)

    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for future in [pool.submit(fetch, name) for name in wanted]:
                future.result()
    finally:
        # Also of a fetch that was broken off: the next one goes on.
        there = {name: file.key for name, file in files.items() if name not in wanted or (folder / name).exists()}
        state.write_text(json.dumps(there))


@contextmanager
def _output(url: epath.Path, names: list[str] | None) -> Iterator[MirroredFolder]:
    """Opens the local folder of what is written at `url`, begun with what is there: all of it, or the files `names`."""
    there = list_files(url, _PATIENCE, below=names is None)
    begun = [name for name in there if names is None or name in names]
    scratch = scratch_folder(url, "out" if names is None else f"out-{'-'.join(names)}")
    lock: FileLock = take_lock(scratch.with_name(f"{scratch.name}.lock"), f"{url} is being written by another program")
    try:
        folder = MirroredFolder(url, scratch.name.partition("-")[2], begun)
        try:
            yield folder
        finally:
            whole = folder.sync()
            folder.close()
        if not whole:
            raise StorageError(f"what was written could not all be copied to {url}; it is in {folder.path}")
    finally:
        lock.release()
