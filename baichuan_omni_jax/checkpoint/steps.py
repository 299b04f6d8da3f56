"""The steps of a workdir: which are there, and which of them are whole, by the checksums of their files.

Orbax alone does not notice a flipped bit. `checksums.json` has the crc32c of every file of a checkpoint; a step without
it does not count.
"""

import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


def steps_folder(workdir: epath.Path) -> epath.Path:
    """Returns the folder that a workdir's steps lie in."""
    return workdir / "checkpoints"


def step_folder(workdir: epath.Path, step: int) -> epath.Path:
    """Returns the folder of one step, whether or not it is there."""
    return steps_folder(workdir) / str(step)


def committed_steps(workdir: epath.Path) -> list[int]:
    """Lists the steps whose save was completed, ascending. Their files are not read."""
    if not steps_folder(workdir).is_dir():
        return []
    folders = [path for path in steps_folder(workdir).iterdir() if path.name.isdigit()]
    # Checksums are written last, and removed first: with them a step counts.
    return sorted(int(path.name) for path in folders if (path / CHECKSUMS).exists())


def newest_good(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str] = ()) -> tuple[int | None, str]:
    """Finds the last of ascending `steps` whose files are as they were written.

    Every host must call it: the first reads, the others learn what it found. Each damaged step is named in a warning.

    Returns:
        The step, None where none is whole, and the first bad file met on the way, "" where no step was damaged.
    """
    step, bad = _newest_good_here(workdir, steps, skip) if jax.process_index() == 0 else (None, "")
    # All hosts must restore the same step, also where one of them reads another state of the file system.
    if jax.process_count() > 1:
        found = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        step = None if found < 0 else found
    return step, bad


def _newest_good_here(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str]) -> tuple[int | None, str]:
    first_bad = ""
    # Newest first: the first good one is the answer.
    for step in reversed(steps):
        bad = verify_checksums(step_folder(workdir, step), skip)
        if bad is None:
            return step, first_bad
        path = step_folder(workdir, step) / bad
        first_bad = first_bad or str(path)
        log.warning("checkpoint of step %d is damaged and passed over: %s is missing or changed", step, path)
    return None, first_bad


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
    """Returns the first file of `folder` that is missing or changed since `write_checksums`, or None when all are well.

    Names starting with one of `skip` (`opt_state/`) are not read. The name is relative to `folder`.
    """
    folder = epath.Path(folder)
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        names = [name for name in sums if not name.startswith(tuple(skip))]
    except (OSError, ValueError, TypeError, AttributeError):
        return CHECKSUMS
    # Missing files are "unreadable", which is nobody's checksum.
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
    """Computes the crc32c of a file, or returns "unreadable"."""
    checksum = google_crc32c.Checksum()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
    except OSError:
        return "unreadable"
    return checksum.hexdigest().decode()
