"""`checksums.json`, the last file of a checkpoint: what its files must be, and the sign that all of them are there.

    {"data.json": "0a1b2c3d", "params/llm/ocdbt.process_0/d/65369923": 67112960, ...}

A file of arrays has its size there, as its chunks have their own crc32c, which is checked when they are read
(`arrays`); every other file has its crc32c. Older versions listed a crc32c for every file: those are read as a whole
to be compared, by one host.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import google_crc32c
from etils import epath

from baichuan_omni_jax.checkpoint.arrays import METADATA, DamagedError, first_damage
from baichuan_omni_jax.storage import is_url, with_retries

T = TypeVar("T")
CHECKSUMS = "checksums.json"
# The trees of arrays of a checkpoint.
BRANCHES, OPT_STATE = "params/", "opt_state/"
# Orbax writes these two after the checksums, for its own book-keeping. Nothing here reads them.
_UNCHECKED = frozenset({CHECKSUMS, "commit_success.txt", "_CHECKPOINT_METADATA"})
_BLOCK = 4 << 20
_THREADS = 8
_UNREADABLE = "unreadable"  # nobody's checksum or size


def write_checksums(folder: epath.PathLike, known: Mapping[str, bytes] | None = None) -> None:
    """Writes `checksums.json` over all files of `folder`.

    Args:
        folder: a checkpoint without it.
        known: relative name -> contents, of files that have just been written: they are not read again.
    """
    folder, known = epath.Path(folder), known or {}
    names = [name for name in sorted(_files(folder)) if name not in _UNCHECKED]

    def expected(name: str) -> str | int:
        if _holds_arrays(name):
            return _size(folder / name)
        return _hex(known[name]) if name in known else _crc32c(folder / name)

    sums = dict(zip(names, _in_threads(expected, names), strict=True))
    with_retries(lambda: (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1)), f"writing {folder / CHECKSUMS}")


def check_files(folder: epath.PathLike, skip: Sequence[str] = ()) -> str | None:
    """Returns the first file of `folder` that is missing or not as `checksums.json` says; None when all are well.

    What arrays hold is not read: that is checked by whoever reads it. Names that begin with one of `skip`
    (`OPT_STATE`) are left out. The name is relative to `folder`. Raises OSError where a bucket cannot be reached.
    """
    folder = epath.Path(folder)
    try:
        sums = json.loads(with_retries((folder / CHECKSUMS).read_text, f"reading {folder / CHECKSUMS}"))
        names = [name for name, _ in sums.items() if not name.startswith(tuple(skip))]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if is_url(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        return CHECKSUMS
    # A list of nothing is no list: a checkpoint has files.
    if not sums:
        return CHECKSUMS

    def actual(name: str) -> str | int:
        return _size(folder / name) if isinstance(sums[name], int) else _crc32c(folder / name)

    return next((name for name, is_ in zip(names, _in_threads(actual, names), strict=True) if is_ != sums[name]), None)


def verify_checksums(folder: epath.PathLike, skip: Sequence[str] = ()) -> str | None:
    """Reads a whole checkpoint; returns what is missing or changed, file or sentence; None when all is well.

    As `check_files`, and every chunk of every array.
    """
    folder = epath.Path(folder)
    bad = check_files(folder, skip)
    trees = [name.rpartition("/")[0] for name in _files(folder) if name.endswith(f"/{METADATA}")]
    for tree in sorted(tree for tree in trees if bad is None and not f"{tree}/".startswith(tuple(skip))):
        try:
            first_damage(folder / tree, tree)
        except DamagedError as error:
            bad = str(error)
    return bad


def _holds_arrays(name: str) -> bool:
    return name.startswith((BRANCHES, OPT_STATE)) and not name.endswith(f"/{METADATA}")


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    # `rglob` of epath refuses to recurse.
    names = []
    for path in folder.iterdir():
        names += _files(path, f"{prefix}{path.name}/") if path.is_dir() else [prefix + path.name]
    return names


def _in_threads(work: Callable[[str], T], names: Sequence[str]) -> list[T]:
    # Checksums are computed, and buckets asked, outside Python's global lock.
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(work, names))


def _size(path: epath.Path) -> int | str:
    return _unless_unreadable(lambda: path.stat().length, path)


def _crc32c(path: epath.Path) -> str:
    """Computes the crc32c of a file, or returns "unreadable"."""

    def read() -> str:
        checksum = google_crc32c.Checksum()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
        return checksum.hexdigest().decode()

    return _unless_unreadable(read, path)


def _unless_unreadable(work: Callable[[], T], path: epath.Path) -> T | str:
    """Raises OSError for an object that is there and cannot be read: a bucket that is down says nothing of it."""
    try:
        return with_retries(work, f"reading {path}")
    except OSError as error:
        if is_url(path) and not isinstance(error, FileNotFoundError):
            raise
        return _UNREADABLE
    except ValueError:  # no name of a file
        return _UNREADABLE


def _hex(contents: bytes) -> str:
    return google_crc32c.Checksum(contents).hexdigest().decode()
