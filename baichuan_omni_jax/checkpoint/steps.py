"""The steps of a workdir: which are there, and which of them are whole, by the checksums of their files.

Orbax alone does not notice a flipped bit. `checksums.json` has the crc32c of every file of a checkpoint; a step without
it does not count.
"""

import json
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from baichuan_omni_jax.storage import is_url, remove, with_retries

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
    folders = [path for path in steps_folder(workdir).iterdir() if path.name.isdecimal()]
    # Checksums are written last, and removed first: with them a step counts.
    return sorted(int(path.name) for path in folders if (path / CHECKSUMS).exists())


def remove_old_steps(workdir: epath.Path, kept: Collection[int]) -> None:
    """Removes the steps that are not `kept`, and whole ones that could not be renamed: a later one is there now."""
    for step in committed_steps(workdir):
        if step not in kept:
            folder = step_folder(workdir, step)
            # Without its checksums the step no longer counts, however far its removal gets.
            remove(folder / CHECKSUMS)
            remove(folder)
    for path in steps_folder(workdir).iterdir():
        if TEMPORARY in path.name and (path / CHECKSUMS).exists():
            remove(path)


def remove_unfinished_steps(workdir: epath.Path) -> bool:
    """Removes temporary folders, and steps without checksums. Returns whether there were any.

    A folder whose checksums are written is whole, it only could not be renamed: it stays until a later step is saved,
    and the log says where it is.
    """
    found, committed, folder = False, set(committed_steps(workdir)), steps_folder(workdir)
    # A bucket has no empty folders.
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if TEMPORARY in path.name and (path / CHECKSUMS).exists():
            log.warning("%s is a whole step that was not renamed: rename it to its number to use it", path)
        elif TEMPORARY in path.name or (path.name.isdigit() and int(path.name) not in committed):
            remove_unfinished(path)
            found = True
    return found


def remove_unfinished(path: epath.Path) -> None:
    """Removes a folder that a killed run left half-written, and says so."""
    log.warning("removing %s, which was left unfinished", path)
    remove(path)


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
# Orbax's name for a folder that is not committed is the final name and this, where commits are renames.
TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax writes these two after the checksums, for its own book-keeping. Nothing here reads them.
_UNCHECKED = frozenset({CHECKSUMS, "commit_success.txt", "_CHECKPOINT_METADATA"})
_BLOCK = 4 << 20
_THREADS = 8


def write_checksums(folder: epath.PathLike) -> None:
    """Writes `checksums.json` (relative path -> crc32c as 8 hex digits) over all files of `folder`."""
    folder = epath.Path(folder)
    names = [name for name in sorted(_files(folder)) if name not in _UNCHECKED]
    sums = dict(zip(names, _crc32c_all(folder, names), strict=True))
    with_retries(lambda: (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1)), f"writing {folder / CHECKSUMS}")


def verify_checksums(folder: epath.PathLike, skip: Sequence[str] = ()) -> str | None:
    """Returns the first file of `folder` that is missing or changed since `write_checksums`, or None when all are well.

    Names starting with one of `skip` (`opt_state/`) are not read. The name is relative to `folder`. Raises OSError
    where a bucket cannot be reached.
    """
    folder = epath.Path(folder)
    try:
        sums = json.loads(with_retries((folder / CHECKSUMS).read_text, f"reading {folder / CHECKSUMS}"))
        names = [name for name in sums if not name.startswith(tuple(skip))]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if is_url(folder) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
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
    """Computes the crc32c of a file, or returns "unreadable".

    Raises OSError for an object that is there and cannot be read: a bucket that is down says nothing of its contents.
    """

    def read() -> str:
        checksum = google_crc32c.Checksum()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
        return checksum.hexdigest().decode()

    try:
        return with_retries(read, f"reading {path}")
    except OSError as error:
        if is_url(path) and not isinstance(error, FileNotFoundError):
            raise
        return "unreadable"
