"""The steps of a workdir: which are there, which of them seem whole, and how all hosts read the same one."""

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.arrays import DamagedError
from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS, check_files
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import read_json_object, remove, write_json

log = logging.getLogger(__name__)

T = TypeVar("T")
# Orbax's name for a folder that is not committed is the final name and this, where commits are renames.
TEMPORARY = ".orbax-checkpoint-tmp"


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
    folders = [path for path in steps_folder(workdir).iterdir() if is_step(path.name)]
    # Checksums are written last, and removed first: with them a step counts.
    return sorted(int(path.name) for path in folders if (path / CHECKSUMS).exists())


def is_step(name: str) -> bool:
    """Whether a folder of this name is of a step as runs name it: a copy that somebody called `08` is none."""
    return name.isascii() and name.isdecimal() and len(name) < 10 and str(int(name)) == name


# Steps that no later one replaces, and since when: {"5": "2026-11-30 17:00:00"}.
KEPT_STEPS = "kept_steps.json"


def kept_steps(workdir: epath.Path) -> list[int]:
    """Lists the steps that `keep_newest` keeps, ascending. Raises ConfigError where the file cannot be read."""
    path = workdir / KEPT_STEPS
    steps = read_json_object(path) if path.exists() else {}
    if odd := [step for step in steps if not is_step(step)]:
        raise ConfigError(f"{path}: {odd[0]!r} is no step: correct it there, or remove the file")
    return sorted(map(int, steps))


def keep_newest(workdir: epath.Path, before: int, coming: Collection[int] = ()) -> int | None:
    """Keeps the newest step before step `before` until a person removes it; `coming`: steps that are being saved.

    Returns the step; None where none was saved before.
    """
    step = max((step for step in {*committed_steps(workdir), *coming} if step < before), default=None)
    if step is not None:
        path = workdir / KEPT_STEPS
        kept = read_json_object(path) if path.exists() else {}
        write_json(path, {str(step): time.strftime("%Y-%m-%d %H:%M:%S")} | kept)
    return step


def remove_old_steps(workdir: epath.Path, kept: Collection[int]) -> None:
    """Removes the steps that are not `kept`, and whole ones that could not be renamed: a later one is there now.

    Those of `keep_newest` stay.
    """
    kept = {*kept, *kept_steps(workdir)}
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
        elif TEMPORARY in path.name or (is_step(path.name) and int(path.name) not in committed):
            remove_unfinished(path)
            found = True
    return found


def remove_unfinished(path: epath.Path) -> None:
    """Removes a folder that a killed run left half-written, and says so."""
    log.warning("removing %s, which was left unfinished", path)
    remove(path)


def newest_good(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str] = ()) -> tuple[int | None, str]:
    """Finds the last of ascending `steps` whose files pass `check_files`.

    Every host must call it: the first looks and tells the others what it found (`Hosts.meet`: no device is waited for).
    Each damaged step is named in a warning.

    Returns:
        The step, None where none is whole, and of the first damaged one met on the way what is wrong with it, or "".
    """
    found = _newest_good_here(workdir, steps, skip) if jax.process_index() == 0 else (None, "")
    # All hosts must restore the same step, also where one of them reads another state of the file system.
    step, bad = json.loads(Hosts.joined().meet(json.dumps(found))[0])
    return step, bad


def _newest_good_here(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str]) -> tuple[int | None, str]:
    first_bad = ""
    # Newest first: the first good one is the answer.
    for step in reversed(steps):
        file = check_files(step_folder(workdir, step), skip)
        if file is None:
            return step, first_bad
        bad = f"{step_folder(workdir, step) / file} is missing or changed"
        first_bad = first_bad or bad
        warn_of_damage(step, bad)
    return None, first_bad


def read_newest(
    workdir: epath.Path, steps: Sequence[int], read: Callable[[int], T], skip: Sequence[str] = ()
) -> tuple[tuple[int, T] | None, str]:
    """Reads the last of ascending `steps` that is whole on all hosts. Every host must call it.

    Args:
        workdir: whose steps.
        steps: those that may be read.
        read: reads what this host needs of a step; raises DamagedError.
        skip: as in `check_files`.

    Returns:
        The step and what was read of it, None where none is whole; and of the first damaged one what is wrong, or "".

    Raises:
        OSError: on every host, where storage refused one of them.
    """
    first_bad, left = "", list(steps)
    while left:
        step, bad = newest_good(workdir, left, skip)
        first_bad = first_bad or bad
        if step is None:
            break
        # The chunks' own checksums are looked at by whoever reads them: what one host finds must turn all away.
        result, bad = read_alike(lambda step=step: read(step))
        if not bad:
            return (step, result), first_bad  # type: ignore[return-value]  nothing was raised
        warn_of_damage(step, bad)
        first_bad, left = first_bad or bad, [known for known in left if known < step]
    return None, first_bad


def read_alike(read: Callable[[], T]) -> tuple[T | None, str]:
    """Returns `read()`, or what any host found damaged, on every host. Raises OSError on all where one has to."""
    result, damage, refusal = None, "", ""
    try:
        result = read()
    except DamagedError as error:
        damage = str(error)
    except OSError as error:
        if jax.process_count() == 1:
            raise
        refusal = f"{type(error).__name__}: {error}"
    told = [json.loads(text) for text in Hosts.joined().meet(json.dumps([refusal, damage]))]
    # The first host's that has one.
    refusal, damage = (next(filter(None, texts), "") for texts in zip(*told, strict=True))
    if refusal:
        raise OSError(refusal)
    return result, damage


def warn_of_damage(step: int, what: str) -> None:
    """Says that a step is passed over; `what` is wrong with it."""
    log.warning("checkpoint of step %d is damaged and passed over: %s", step, what)
