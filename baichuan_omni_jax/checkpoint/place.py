"""The place of a workdir: how a checkpoint can be committed there, and how one run keeps others out."""

import logging
from pathlib import Path

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS
from baichuan_omni_jax.checkpoint.steps import steps_folder
from baichuan_omni_jax.errors import storage_error
from baichuan_omni_jax.storage import FileLock, check_writable, is_url, renames_folders, scratch_folder, take_lock

log = logging.getLogger(__name__)

# Locked by the run that works in the folder; the file itself stays.
LOCK = ".lock"


def probe_commit(workdir: epath.Path) -> bool:
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


def lock_workdir(workdir: epath.Path) -> FileLock:
    """Takes the workdir for this process. Raises ConfigError, naming the other, while another process works there."""
    refusal = f"workdir {workdir} is in use by another run; nothing was changed"
    if not is_url(workdir):
        return take_lock(Path(workdir) / LOCK, refusal)
    # A bucket has no locks that go with a process (docs/decisions/0108). This one is of the machine alone.
    scratch = scratch_folder(workdir, "run")
    lock = take_lock(scratch.with_name(f"{scratch.name}{LOCK}"), refusal)
    log.warning("%s is in a bucket, which has no locks: see to it that no other machine trains there", workdir)
    return lock
