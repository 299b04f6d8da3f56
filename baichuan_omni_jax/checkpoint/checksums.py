"""crc32c of every file of a checkpoint: Orbax alone does not notice a flipped bit."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
from etils import epath

CHECKSUMS = "checksums.json"
# Orbax writes these two after the checksums, for its own book-keeping. Nothing here reads them.
_UNCHECKED = frozenset({CHECKSUMS, "commit_success.txt", "_CHECKPOINT_METADATA"})
_BLOCK = 4 << 20
_THREADS = 8


def write_checksums(folder: epath.PathLike) -> None:
    """Writes `checksums.json` (relative path -> crc32c as 8 hex digits) over all files of `folder`."""
    folder = epath.Path(folder)
    names = [name for name in sorted(_files(folder)) if name not in _UNCHECKED]
    sums = dict(zip(names, _crc32c_all(folder, names), strict=True))
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def verify_checksums(folder: epath.PathLike, skip: Sequence[str] = ()) -> str | None:
    """The first file of `folder` that is missing or changed since `write_checksums`, or None when all are well.

    Names starting with one of `skip` (`opt_state/`) are not read. The name is relative to `folder`.
    """
    folder = epath.Path(folder)
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        names = [name for name in sums if not name.startswith(tuple(skip))]
    except (OSError, ValueError, TypeError, AttributeError):
        return CHECKSUMS
    found = _crc32c_all(folder, names)
    return next((name for name, crc in zip(names, found, strict=True) if crc != sums[name]), None)


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    # `rglob` of epath refuses to recurse.
    names = []
    for path in folder.iterdir():
        names += _files(path, f"{prefix}{path.name}/") if path.is_dir() else [prefix + path.name]
    return names


def _crc32c_all(folder: epath.Path, names: Sequence[str]) -> list[str]:
    # The checksum is computed outside Python's global lock, so threads read several files at once.
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda name: _crc32c(folder / name), names))


def _crc32c(path: epath.Path) -> str:
    """crc32c of a file, or "unreadable"."""
    checksum = google_crc32c.Checksum()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
    except OSError:
        return "unreadable"
    return checksum.hexdigest().decode()
