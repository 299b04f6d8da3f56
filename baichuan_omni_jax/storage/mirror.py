"""A local folder whose files grow (metrics, TensorBoard, traces) and are copied to the bucket that they belong to.

Objects cannot be appended to: a run whose workdir is a URL writes such files in a scratch folder of its own, which is
copied there before each save, every minute and at the end. Killed, it loses the lines since then; those up to the
step that it resumes from are in the bucket, as they were copied before that step was saved.

    with a workdir on a file system     the folder is the workdir, and nothing is copied
    $XDG_CACHE_HOME (or ~/.cache)/baichuan_omni_jax/workdirs/HASH-OWNER/     else; emptied at each start
"""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from baichuan_omni_jax.errors import storage_error
from baichuan_omni_jax.storage.paths import cache_home, is_url, remove, with_retries

log = logging.getLogger(__name__)

SECONDS = 60.0  # between two copies


class MirroredFolder:
    """The folder `path` for the growing files of `location`.

    Args:
        location: where they belong: a folder of a file system, or a URL.
        owner: a name for each of the processes that work for `location` on one machine.
        fetch: names of files to begin with, where the bucket has them.

    Raises:
        ConfigError: the scratch folder cannot be made, or a file of `fetch` cannot be read.
    """

    def __init__(self, location: epath.Path, owner: str, fetch: Sequence[str] = ()) -> None:
        self.location, self._remote = location, is_url(location)
        self._copied: dict[str, tuple[int, int]] = {}  # name -> size and time of change when it was copied
        self._copying = threading.Lock()
        self._ended = threading.Event()
        if not self._remote:
            self.path = Path(location)
            return
        self.path = scratch_folder(location, owner)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        self.fetch(fetch)
        self._thread = threading.Thread(target=self._copy_at_intervals, name="mirror", daemon=True)
        self._thread.start()

    def sync(self) -> bool:
        """Copies what changed since it was copied last, and removes there what was removed here.

        A bucket that cannot be reached is warned of and tried again the next time. Returns whether all is there.
        """
        if not self._remote:
            return True
        with self._copying:
            try:
                self._copy_changes()
            except OSError as error:
                log.warning("numbers of this run could not be copied to %s: %s", self.location, error)
                return False
        return True

    def fetch(self, names: Sequence[str]) -> None:
        """Takes files as the bucket has them, where it does. Raises ConfigError for one that cannot be read."""
        for name in names if self._remote else ():
            source, path = self.location / name, self.path / name
            try:
                contents = with_retries(source.read_bytes, f"reading {source}")
            except FileNotFoundError:
                continue
            except OSError as error:
                raise storage_error(error, f"{source} cannot be read") from error
            with self._copying:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
                status = path.stat()
                self._copied[name] = (status.st_size, status.st_mtime_ns)

    def close(self) -> None:
        """Copies for the last time; the scratch folder goes unless something could not be copied."""
        if not self._remote or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if self.sync():
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            log.error("what could not be copied to %s is in %s", self.location, self.path)

    def _copy_at_intervals(self) -> None:
        while not self._ended.wait(SECONDS):
            self.sync()

    def _copy_changes(self) -> None:
        there = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file() and not path.name.endswith(".partial"):
                status = path.stat()
                there[path.relative_to(self.path).as_posix()] = (status.st_size, status.st_mtime_ns)
        # What was written last says, as a rule, that the rest is there.
        for name, state in sorted(there.items(), key=lambda item: item[1][1]):
            if self._copied.get(name) != state:
                target = self.location / name
                # Noted as it was before it was read: what is appended meanwhile is copied next time.
                contents = (self.path / name).read_bytes()
                with_retries(lambda target=target, contents=contents: target.write_bytes(contents), f"writing {target}")
                self._copied[name] = state
        for name in [name for name in self._copied if name not in there]:
            target = self.location / name
            remove(target)
            del self._copied[name]


def discard_scratch(location: epath.Path, owner: str) -> None:
    """Removes the scratch folder that a killed process left, where nobody goes on with its run."""
    if is_url(location):
        shutil.rmtree(scratch_folder(location, owner), ignore_errors=True)


def scratch_folder(location: epath.Path, owner: str) -> Path:
    """Returns the scratch folder of a URL on this machine, whose parent is there. Raises ConfigError."""
    cache = cache_home() / "workdirs"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, f"{cache}, for what a run keeps on this machine, cannot be made") from error
    return cache / f"{hashlib.sha256(os.fspath(location).encode()).hexdigest()[:16]}-{owner}"
