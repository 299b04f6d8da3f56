"""Reading that outlasts storage which fails for a while: what a system or a network refuses is no damage of the data.

A server that restarts, a mount that hangs or a handle that went stale refuse reads that work a minute later. They are
tried again until `seconds` (a run's `data.patience`) have passed, then a `StorageError` ends the work. What is not
there or not allowed is told at once, by the exceptions of the system.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from baichuan_omni_jax.errors import StorageError
from baichuan_omni_jax.storage.paths import is_final, may_pass, with_retries

T = TypeVar("T")

PATIENCE = 300.0  # seconds: a server that is replaced, and its clients' own pauses
_BUFFER = 1 << 16  # bytes


def patiently(work: Callable[[], T], doing: str, seconds: float = PATIENCE) -> T:
    """Returns `work()`, tried again while storage refuses it for what may pass.

    Args:
        work: reads, and may be called several times.
        doing: what it does, for messages: "reading data/documents-00003.array_record".
        seconds: for how long it is tried.

    Returns:
        What `work` returned.

    Raises:
        StorageError: storage refused it until the time was up, or for a reason that no waiting mends (no memory).
        OSError: what is read is not there, no file, or not allowed. Other exceptions of `work` pass at once.
    """
    try:
        return with_retries(work, doing, seconds)
    except OSError as error:
        if is_final(error):
            raise
        tried = f", tried for {seconds:g} s" if may_pass(error) else ""
        raise StorageError(f"{doing} failed{tried}: {error.strerror or error}") from error


def open_patiently(
    path: Path, seconds: float = PATIENCE, faults: list[StorageError] | None = None
) -> io.BufferedReader:
    """Opens the file `path` for reading; reads that fail are tried again as `patiently` does.

    Args:
        path: a file of this machine, or mounted on it.
        seconds: for how long a read is tried.
        faults: takes the StorageError of a read: decoders may swallow it, or take it for the end of the file.

    Returns:
        The stream, at its start.

    Raises:
        StorageError: it could not be opened.
        OSError: it is not there, or not allowed.
    """
    faults = [] if faults is None else faults
    raw: Any = patiently(lambda: _PatientFile(path, seconds, faults), f"opening {path}", seconds)
    return io.BufferedReader(raw, _BUFFER)


class _PatientFile(io.FileIO):
    """A file whose reads are tried again."""

    def __init__(self, path: Path, seconds: float, faults: list[StorageError]):
        super().__init__(path)
        self._path, self._seconds, self._faults = path, seconds, faults

    def readinto(self, buffer) -> int | None:
        return self._patiently(lambda: io.FileIO.readinto(self, buffer))

    def read(self, size: int | None = -1) -> bytes | None:
        return self._patiently(lambda: io.FileIO.read(self, -1 if size is None else size))

    def readall(self) -> bytes:
        return self._patiently(lambda: io.FileIO.readall(self))

    def _patiently(self, read: Callable[[], T]) -> T:
        place = self.tell()
        try:
            return read()
        except OSError:
            pass

        def again() -> T:
            # Opened anew: the handle of a file that its server has replaced never reads again.
            io.FileIO.__init__(self, self._path)
            self.seek(place)
            return read()

        try:
            return patiently(again, f"reading {self._path}", self._seconds)
        except StorageError as error:
            self._faults.append(error)
            raise
