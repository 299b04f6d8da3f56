"""Steps on the hosts' own disks, between those in the workdir: a lost process costs minutes of training, not an hour.

    FOLDER/STEP/params/BRANCH/, opt_state/    this host's parts of the arrays (`arrays`), replicas too
    FOLDER/STEP/step.json                     whose step it is, and the data plan's state

Every host writes what its own devices hold and needs nobody else to: no barrier, no bucket. A step counts where all
hosts have it, of this run, on top of a step that is in the workdir, and for the parts that each host's devices need
now. Otherwise (a new machine, another mesh) the workdir's newest step is what a run goes on from.
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import google_crc32c
import jax
from etils import epath

from baichuan_omni_jax.checkpoint.arrays import METADATA, DamagedError, copy_parts, metadata_text, write_parts
from baichuan_omni_jax.checkpoint.steps import is_step, read_alike
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import local_path, scratch_folder

log = logging.getLogger(__name__)

T = TypeVar("T")
Trees = Mapping[str, Mapping[str, Any]]
_STEP, _PARTIAL = "step.json", ".partial"
# Hosts die at different moments: the step that all of them have may be the one before the newest.
KEEP = 2


class LocalSteps:
    """The steps of one run on this host's disk.

    Args:
        workdir: the run's workdir, path or URL.
        folder: `checkpoint.local_dir`; "": below `$XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, workdir: epath.Path, folder: str = "") -> None:
        scratch = scratch_folder(workdir, f"steps_{jax.process_index()}")
        self.folder = local_path(folder, "checkpoint.local_dir") / scratch.name if folder else scratch
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"checkpoint.local_dir {self.folder} cannot be made: {error.strerror}") from error
        for left in self.folder.glob(f"*{_PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        self._writing: threading.Thread | None = None

    def save(
        self, step: int, trees: Mapping[str, Mapping[str, Any]], data_state: Mapping[str, Any], owner: dict
    ) -> bool:
        """Copies this host's parts and writes them in the background; not while the step before is being written.

        Args:
            step: finished steps of the run.
            trees: folder name -> arrays by dotted name.
            data_state: the data plan's state.
            owner: what must be the same for the step to be of use (`newest`).

        Returns:
            Whether it will be written. One that fails is warned of: there is the workdir.
        """
        if self._writing is not None and self._writing.is_alive():
            log.warning("step %d is not kept on this host: the one before is still being written", step)
            return False
        parts = {name: copy_parts(named, replicas=True) for name, named in trees.items()}
        names = {name: list(named) for name, named in trees.items()}
        text = json.dumps({"owner": owner, "data_state": dict(data_state)}, ensure_ascii=False)

        def write() -> None:
            partial = self.folder / f"{step}{_PARTIAL}"
            try:
                for name, own in parts.items():
                    write_parts(epath.Path(partial / name), own)
                    (partial / name / METADATA).write_text(metadata_text(names[name]))
                (partial / _STEP).write_text(json.dumps({"text": text, "crc32c": _crc32c(text)}))
                shutil.rmtree(self.folder / str(step), ignore_errors=True)
                partial.rename(self.folder / str(step))
                self.remove(self.steps()[:-KEEP])
            except Exception as error:  # whatever ails this disk, the run goes on
                shutil.rmtree(partial, ignore_errors=True)
                log.warning("step %d could not be kept in %s: %s", step, self.folder, error)

        self._writing = threading.Thread(target=write, name="local-checkpoint")
        self._writing.start()
        return True

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def steps(self) -> list[int]:
        """Lists the steps that were written to their end on this host, ascending."""
        return sorted(int(path.name) for path in self.folder.iterdir() if is_step(path.name))

    def remove(self, steps: list[int]) -> None:
        """Removes steps; what cannot be removed stays."""
        for step in steps:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def read_newest(
        self, above: int, is_own: Callable[[dict], bool], read: Callable[[epath.Path, int, dict], T]
    ) -> tuple[int, T] | None:
        """Reads the newest step that is good on all hosts. Every host must call it.

        Args:
            above: steps up to this one are not wanted: the workdir has it.
            is_own: whether a step of this owner (`save`) is of this run.
            read: reads a step from its folder, number and data state; raises DamagedError.

        Returns:
            The step and what was read; None where there is none.
        """
        owned = {step: state for step in self.steps() if step > above and (state := self._state(step, is_own))}
        for step in _on_all_hosts(sorted(owned, reverse=True)):
            result, bad = read_alike(lambda step=step: self._read(step, read, owned[step]))
            if not bad:
                return step, result  # type: ignore[return-value]  nothing was raised
            log.warning("step %d on the hosts' own disks is not used: %s", step, bad)
        return None

    def _read(self, step: int, read: Callable[[epath.Path, int, dict], T], data_state: dict) -> T:
        """Reads a step; whatever is wrong with this disk, the workdir has one to go on from."""
        try:
            return read(epath.Path(self.folder / str(step)), step, data_state)
        except (ConfigError, OSError) as error:
            raise DamagedError(str(error)) from error

    def _state(self, step: int, is_own: Callable[[dict], bool]) -> dict | None:
        """Reads the data's state of a step; None where the step is another run's, or damaged."""
        try:
            stored = json.loads((self.folder / str(step) / _STEP).read_text())
            if _crc32c(stored["text"]) != stored["crc32c"]:
                return None
            found = json.loads(stored["text"])
            return dict(found["data_state"]) if is_own(found["owner"]) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None


def _on_all_hosts(steps: list[int]) -> list[int]:
    """Returns those of descending `steps` that every host has."""
    told = [json.loads(text) for text in Hosts.joined().meet(json.dumps(steps))]
    return [step for step in steps if all(step in others for others in told)]


def _crc32c(text: str) -> str:
    return google_crc32c.Checksum(text.encode()).hexdigest().decode()
