"""The folder of one run: whether steps can be renamed there, which are there, and how the run keeps others out."""

import logging
from pathlib import Path

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.branches import KEPT, remove_leftovers
from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS
from baichuan_omni_jax.checkpoint.provenance import (
    PARENT,
    RUN_CONFIG,
    STARTS,
    check_run_config,
    note_start,
    run_identity,
    store_run_config,
)
from baichuan_omni_jax.checkpoint.steps import committed_steps, steps_folder
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.errors import storage_error
from baichuan_omni_jax.storage import (
    FileLock,
    check_writable,
    is_url,
    parse_path,
    remove,
    renames_folders,
    scratch_folder,
    take_lock,
)

log = logging.getLogger(__name__)

# Locked by the run that works in the folder; the file itself stays.
LOCK = ".lock"


class RunFolder:
    """A workdir as the folder of one run. Every process of the run makes one and calls it alike.

    `path` may be a URL (`storage.parse_path`). Raises ConfigError when a folder cannot be made, or be written.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self.path = parse_path(path)
        self.changes = ""  # what is not as it was at the start before, in words
        self.identity = ""  # the run's own number, once `write_run_config` has taken the folder
        self._damaged: set[int] = set()
        self._lock: FileLock | None = None
        self._new: list[str] = []  # what says whose folder this is and was not there before
        try:
            steps_folder(self.path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"workdir {self.path} cannot be made") from error
        self.renames = _probe_commit(self.path)

    def hold(self) -> None:
        """Keeps other runs out of the folder until `release`, or until this process is gone, killed or not.

        Process 0 locks for all processes of the run; the others learn of it by `hosts.on_all_hosts`. Calls may repeat.
        Raises ConfigError, naming its process and host, while another run works there.
        """
        if jax.process_index() == 0 and self._lock is None:
            self._lock = _lock_folder(self.path)

    def release(self) -> None:
        """Lets other runs in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_run_config(self, run: RunConfig) -> None:
        """Takes the folder for `run`: call it before anything else, once, at the start.

        A new folder gets `run_config.json`; an old one must hold the same run, but for the keys of `MAY_DIFFER`.
        Then what a killed run left half-written is removed. Raises ConfigError naming the first other key, and on host
        0 that or StorageError where the workdir cannot be written: other hosts learn of it by `hosts.on_all_hosts`.
        """
        changed = check_run_config(self.path, run)
        self._new = [name for name in (RUN_CONFIG, STARTS, PARENT, KEPT) if not (self.path / name).exists()]
        # Every host has read the old one before the first host writes the new one.
        hosts = Hosts.joined()
        hosts.meet("workdir checked")
        refused = None
        if jax.process_index() == 0:
            try:
                self.changes = note_start(self.path, self.latest_step() or 0, changed)
                store_run_config(self.path, run)
                remove_leftovers(self.path)
            except OSError as error:  # told once the others have come here: they would wait for this host
                refused = error
        hosts.meet("workdir taken")
        if refused is not None:
            raise storage_error(refused, f"workdir {self.path} cannot be written") from refused
        self.identity = run_identity(self.path)

    def give_up(self) -> None:
        """Undoes `write_run_config` of a new folder that holds no step: a corrected run may have it.

        For a run that was refused after all. Parent and audio tokenizer that it wrote down go too.
        """
        if jax.process_index() or RUN_CONFIG not in self._new or self.latest_step() is not None:
            return
        # The run's configuration last: as long as it is there, the rest is known to belong to that run.
        for name in reversed(self._new):
            remove(self.path / name)

    def steps(self) -> list[int]:
        """Lists the steps that were saved completely, ascending, without those that were found damaged."""
        return [step for step in committed_steps(self.path) if step not in self._damaged]

    def latest_step(self) -> int | None:
        """Returns the newest step; None where there is none."""
        return max(self.steps(), default=None)

    def has_step(self, step: int) -> bool:
        """Returns whether a step was saved completely."""
        return step in self.steps()


def _probe_commit(workdir: epath.Path) -> bool:
    """Finds out, by trying, how steps are committed here: whether by a rename. Raises ConfigError."""
    if is_url(workdir):
        check_writable(workdir, "workdir")
        return False
    try:
        renames = renames_folders(steps_folder(workdir))
    except OSError as error:
        raise storage_error(error, f"workdir {workdir} cannot be written") from error
    if not renames and jax.process_index() == 0:
        log.warning(
            "%s: folders cannot be renamed there; a checkpoint counts once its %s is written", workdir, CHECKSUMS
        )
    return renames


def lock_file(workdir: epath.Path) -> Path:
    """Returns the file that the run of a workdir locks on its machine."""
    if not is_url(workdir):
        return Path(workdir) / LOCK
    scratch = scratch_folder(workdir, "run")
    return scratch.with_name(f"{scratch.name}{LOCK}")


def _lock_folder(workdir: epath.Path) -> FileLock:
    """Takes the workdir for this process. Raises ConfigError, naming the other, while another process works there."""
    lock = take_lock(lock_file(workdir), f"workdir {workdir} is in use by another run; nothing was changed")
    # A bucket has no locks that go with a process (docs/decisions/0108). This one is of the machine alone.
    if is_url(workdir):
        log.warning("%s is in a bucket, which has no locks: see to it that no other machine trains there", workdir)
    return lock
