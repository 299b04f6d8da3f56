"""Locks of files: what keeps a second program out of a folder in which one is at work.

A lock is the operating system's (`flock`) on a file that stays where it is: it goes with the process, also with a
killed one, and no child of the process keeps it. Network file systems that know `flock` (NFS, Lustre mounted with it)
tell hosts apart as well; where there are no locks at all, the log warns and work goes on without one.
"""

import errno
import fcntl
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError

log = logging.getLogger(__name__)

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_NOTE_BYTES = 400


class FileLock:
    """A lock that is held until `release`, or until the process is gone. Made by `take_lock`."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        _HELD.add(self)

    def release(self) -> None:
        """Lets the next program in. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


_HELD: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def take_lock(path: Path, refusal: str, *, wait: bool = False, note: bool = True) -> FileLock:
    """Locks the file `path`, which is made where it is not there.

    Args:
        path: a file that nothing else is kept in, unless `note` is off.
        refusal: the sentence for when another program has the lock; who that is follows in brackets.
        wait: waits for the other program instead of refusing.
        note: writes into the file who holds it.

    Returns:
        The lock, held. Where the file system has no locks, one that keeps nobody out, with a warning.

    Raises:
        ConfigError: another program has the lock, or the file cannot be written.
    """
    try:
        lock = FileLock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _TAKEN:
            holder = os.pread(lock._descriptor, _NOTE_BYTES, 0).decode("utf-8", "replace").strip() if note else ""
            lock.release()
            raise ConfigError(f"{refusal}{f' ({holder})' if holder else ''}") from None
        log.warning("the file system of %s has no locks (%s): two programs there do not see each other", path, error)
        return lock
    if note:
        # For the sentence that another program is refused with.
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.ftruncate(lock._descriptor, 0)
        os.pwrite(lock._descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    return lock


def _forget_in_child() -> None:
    """Releases the locks that a forked child shares with its parent: it would hold them on when the parent is gone."""
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
