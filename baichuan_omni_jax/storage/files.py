"""Files: what stands in for one that was never fetched, JSON, writes that are whole or not at all.

A clone without Git LFS, a download that ended at a login page or an interrupted copy leave files of the right name that
hold something else. Decoders would call each of them corrupt; here they are called what they are.
"""

import glob
import io
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from etils import epath

from baichuan_omni_jax.errors import ConfigError, storage_error
from baichuan_omni_jax.storage.paths import is_url, with_retries

log = logging.getLogger(__name__)

_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes, after white space and in lower case, of what servers send instead of a file.
_PAGES = {b"<!doctype": "a web page", b"<html": "a web page", b"<?xml": "a message in XML"}
_HEAD_BYTES = 512  # a pointer is shorter


def describe_stand_in(path: Path | epath.Path) -> str:
    """Describes what stands in the place of the file `path`, as the end of "PATH is ..."; "" where it may be the file.

    Raises OSError when it cannot be opened.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "empty: it was never written, or never fetched"
    if head.startswith(_LFS):
        return f"a pointer of Git LFS{_pointed_size(head)}, not the file itself: fetch it with `git lfs pull`"
    if head.startswith(b"/annex/objects/") or b".git/annex/objects/" in head:
        return "a pointer of git-annex, not the file itself: fetch it with `git annex get`"
    start = head.lstrip().lower()
    page = next((name for first, name in _PAGES.items() if start.startswith(first)), "")
    return f"{page}, not the file itself: the download of it failed" if page else ""


def _pointed_size(head: bytes) -> str:
    """Returns the size that a pointer gives for its file, as a part of a sentence."""
    sizes = [line[5:] for line in head.decode("utf-8", "replace").splitlines() if line.startswith("size ")]
    return f" (to {int(sizes[0]):,} bytes)" if sizes and sizes[0].isdigit() else ""


def refuse_stand_in(path: Path | epath.Path) -> None:
    """Raises ConfigError when something else stands in the place of the file `path`, or it cannot be opened."""
    try:
        found = describe_stand_in(path)
    except OSError as error:
        raise storage_error(error, f"{path} cannot be read") from error
    if found:
        raise ConfigError(f"{path} is {found}")


def read_json_object(path: epath.PathLike) -> dict[str, Any]:
    """Reads the JSON object in the file `path`, which may be a URL: UTF-8 with or without a mark of byte order.

    Raises ConfigError naming the file: it cannot be read, is a stand-in, no UTF-8, no JSON, or no object. StorageError
    where storage may give it later.
    """
    try:
        file = epath.Path(path)
        text = with_retries(file.read_bytes, f"reading {path}")
        if found := describe_stand_in(file):
            raise ConfigError(f"{path} is {found}")
        values = json.loads(text.decode("utf-8-sig"))
    except ConfigError:
        raise
    except OSError as error:
        raise storage_error(error, f"{path} cannot be read") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object but {type(values).__name__}")
    return values


@contextmanager
def atomic_write(path: Path | epath.Path, mode: str = "w", *, suffix: str = ".partial") -> Iterator[IO[Any]]:
    """Opens a file beside `path` that takes its place when the block ends; after an error there is only the old one.

    Args:
        path: the file to write, on a file system or in a bucket. Its folder exists.
        mode: `w` (text, UTF-8) or `wb`.
        suffix: what the file beside it is called while it is written. Where several processes may write the same file,
            one that is each process' own.
    """
    # An object appears as a whole when it is uploaded, and a bucket renames by copying: kept here, then sent.
    if is_url(path):
        buffer = io.BytesIO()
        file = buffer if "b" in mode else io.TextIOWrapper(buffer, encoding="utf-8", newline="", write_through=True)
        yield file
        file.flush()
        with_retries(lambda: path.write_bytes(buffer.getvalue()), f"writing {path}")
        return
    partial = path.with_name(f"{path.name}{suffix}")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path | epath.Path, values: object) -> None:
    """Writes `values` as JSON, whole or not at all, whichever other process writes it too; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, suffix=f".{os.getpid()}.partial") as file:
        file.write(json.dumps(values, ensure_ascii=False, indent=1))


def check_target(target: Path) -> None:
    """Raises ConfigError when `target` is there and is not an empty folder, or has no place to be."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} already exists and is not empty; nothing was written")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{target} cannot be made: {above} is not a folder")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Makes a folder beside `target` that takes its place at the end, or vanishes when anything is raised.

    Raises ConfigError as `check_target` does, where a folder cannot be made, and for what the file system refuses
    while the folder is written (a full disk).
    A killed process leaves the folder beside `target`, under a hidden name: it is taken for nothing, and the next one
    that writes there on the same host removes it.
    """
    check_target(target)
    made = _make_parents(target)
    _remove_abandoned(target)
    temporary = target.with_name(f".{target.name}.part-{socket.gethostname()}-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        check_target(target)  # another program may have filled it meanwhile
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error
        raise


def _remove_abandoned(target: Path) -> None:
    """Removes folders that `staged_folder` made for `target` in processes of this host that are no more."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
        host, _, number = folder.name.rpartition(".part-")[2].rpartition("-")
        # Of another host nothing is known: its processes may be at work on a shared file system.
        if host != socket.gethostname() or not number.isdigit():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            log.info("removing %s, which a killed process left", folder)
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, OverflowError):
            pass  # somebody else's, and alive


def _make_parents(target: Path) -> list[Path]:
    """Makes the folders above `target`; returns those that were not there, deepest first."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target.parent} cannot be made: {error.strerror}") from error
    return made
