"""The folder of a chain of runs: a path of this machine for its own files and its stages' numbers, also of a URL.

    gs://BUCKET/CHAIN/NAME/           a stage's workdir: the stage itself writes there
    gs://BUCKET/CHAIN/chain.json      and the table, the report, the logs: written in a scratch folder, and copied

Of a stage that is finished the scratch folder has the small files that tables and reports are made of; those of one at
work are in the scratch folder that its own process copies from.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from etils import epath

from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.evaluation.chain_record import is_chain_file, is_stage_file
from baichuan_omni_jax.storage import MirroredFolder, check_writable, is_url, scratch_folder, take_lock
from baichuan_omni_jax.storage.cache import list_files

_PATIENCE = 60.0  # seconds: somebody waits for the command


class ChainFolder:
    """What a chain keeps beside its stages, in the local folder `path`; `location` is where it belongs."""

    def __init__(self, location: epath.Path, owner: str) -> None:
        self.location, self._remote = location, is_url(location)
        if self._remote:
            check_writable(location, "--workdir")
        self._mirror = MirroredFolder(location, owner, self._listed(is_chain_file))
        self.path = self._mirror.path

    def home_at_work(self, name: str) -> Path:
        """Returns where the numbers of a stage grow while it is at work."""
        return scratch_folder(self.location / name, "host_0") if self._remote else self.path / name

    def refresh(self) -> None:
        """Fetches the numbers that stages have written by now."""
        self._mirror.fetch(self._listed(is_stage_file))

    def close(self) -> None:
        """Copies for the last time what was written here."""
        self._mirror.close()

    def _listed(self, wanted: Callable[[str], bool]) -> list[str]:
        return list(filter(wanted, list_files(self.location, _PATIENCE, below=True))) if self._remote else []


@contextmanager
def chain_folder(location: epath.Path, owner: str = "chain", taken: str = "") -> Iterator[ChainFolder]:
    """Makes the folder of a chain that runs inside. What storage refuses is told in one sentence.

    Args:
        location: the folder, or its URL.
        owner: what the scratch folder of a URL is called: one for each program that may be at work.
        taken: what is said where another program works there; "": of a folder nobody is kept out, as the hosts of a
            run share it.

    Raises:
        ConfigError: the folder cannot be made, or is taken.
        StorageError: storage does not answer.
        RunStoppedError: something cannot be written there any more, as on a full disk.
    """
    try:
        location.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir {location} cannot be made: {error.strerror}") from error
    with ExitStack() as stack:
        # Before what is there is touched: the scratch folder of another program would be emptied.
        if is_url(location):
            scratch = scratch_folder(location, owner)
            lock = scratch.with_name(f"{scratch.name}.lock")
            stack.callback(take_lock(lock, taken or f"another chain is at work in {location}").release)
        elif taken:
            stack.callback(take_lock(Path(location) / ".lock", taken).release)
        folder = ChainFolder(location, owner)
        stack.callback(folder.close)
        try:
            yield folder
        except OSError as error:
            raise RunStoppedError(f"{location}: {error}; the same command goes on") from error
