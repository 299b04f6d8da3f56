"""The workdir of a training run: steps saved in the background, kept to a number, and found again after any end."""

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.branches import branch_folder, checkpoint_texts, remove_leftovers
from baichuan_omni_jax.checkpoint.local import LocalSteps
from baichuan_omni_jax.checkpoint.run_folder import RunFolder
from baichuan_omni_jax.checkpoint.steps import (
    keep_newest,
    read_newest,
    remove_old_steps,
    step_folder,
    steps_folder,
)
from baichuan_omni_jax.checkpoint.trees import FolderSave, leaves_by_name, make_checkpointer, read_tree, stored_names
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.storage import is_url

log = logging.getLogger(__name__)

# Saves in a row that may fail before the run ends, and seconds before the second one: then twice as long each time.
TRIES, PAUSE = 4, 2.0
# Attempts to remove the remains of a failed save until none is left, and seconds between.
_REMOVALS, _PAUSE = 20, 0.2


class Restored(NamedTuple):
    """A step read back."""

    branches: dict[str, Any]  # branch -> module
    opt_state: Any  # the optimizer's state
    data_state: dict[str, Any]  # the data plan's state
    step: int


class Workdir(RunFolder):
    """Saves and restores the steps of one run under `path`. Every process of the run makes one and calls it alike.

    `keep` (>= 1) newest steps stay. A background save that fails is logged at once; see `save_failed` and `wait`.
    `local` is the folder for steps on each host's own disk (`LocalSteps`); None: there are none. Raises ConfigError as
    `RunFolder`.
    """

    def __init__(self, path: epath.PathLike, keep: int, *, local: str | None = None) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep must be at least 1, not {keep}")
        super().__init__(path)
        self.keep = keep
        self._saving: threading.Thread | None = None
        self._coming = 0  # the step that it saves
        self._error: tuple[int, BaseException] | None = None
        # Saves that failed since the last good one, and when (monotonic clock).
        self._failures, self._failed_at = 0, 0.0
        self._times: dict[str, float] = {}  # of the newest save that has ended
        self._newest: int | None = None  # the newest step there, as far as this host knows
        self._local = None if local is None else LocalSteps(self.path, local)
        self._checkpointer = make_checkpointer(self.renames)

    def give_up(self) -> None:
        """As `RunFolder.give_up`, once nothing is being saved."""
        self.wait()
        super().give_up()

    def save(
        self,
        step: int,
        branches: Mapping[str, Any],
        opt_state: Any,
        data_state: Mapping[str, Any],
        config: OmniConfig,
        tokenizer_json: str = "",
        *,
        trained: Mapping[str, int] | None = None,
    ) -> None:
        """Starts saving a step and returns when every array is copied: its buffers may then be donated.

        Waits for the save before this one; if that failed, this one takes its place. A step that is there already is
        left as it is.

        Args:
            step: finished steps of the run.
            branches: name -> module.
            opt_state: any tree of arrays.
            data_state: the data plan's state, any JSON.
            config: the model's sizes.
            tokenizer_json: the text of a tokenizer.json or a path to one; "": none.
            trained: branch -> optimizer steps, for `branches.json` (default: `step` for each).

        Raises:
            RunStoppedError: this save could not begin, or those before failed too often in a row.
        """
        began = time.monotonic()
        self._join()
        if self._error is not None and not self.may_retry():
            self.wait()
        self._error = None
        if self.has_step(step):
            log.info("step %d is already saved in %s", step, self.path)
            return
        trained = dict.fromkeys(branches, step) if trained is None else trained
        texts = checkpoint_texts(branches, config, tokenizer_json, trained)
        texts["data.json"] = json.dumps(data_state, ensure_ascii=False)
        # Small files as text, arrays as trees: both are committed together.
        trees = _trees(branches, opt_state)
        # A folder of that name can only be damaged or incomplete here, so it may go.
        try:
            self._checkpointer.save(step_folder(self.path, step), args=FolderSave(trees, texts), force=True)
        except Exception as error:  # a bucket's client has classes of its own
            self._note_failure(step, error)
            if is_url(self.path) and self.may_retry():
                return
            self.wait()
        # From here on the arrays are copies: the next step may run while they are written.
        times = {
            "checkpoint_blocked_s": time.monotonic() - began,
            "checkpoint_bytes": float(sum(leaf.nbytes for named in trees.values() for leaf in named.values())),
        }
        self._coming = step
        self._saving = threading.Thread(target=self._finish, args=(step, began, times), name="checkpoint")
        self._saving.start()

    def save_local(self, step: int, branches: Mapping[str, Any], opt_state: Any, data_state: Mapping[str, Any]) -> None:
        """Keeps a step on the hosts' own disks, as `save` otherwise; only once the workdir has one that it comes after.

        Every host must call it. Nothing is raised: a step that cannot be kept there is warned of.
        """
        if self._local is None or self._newest is None or not self.identity:
            return
        owner = {"run": self.identity, "base": self._newest}
        self._local.save(step, _trees(branches, opt_state), data_state, owner)

    def take_times(self) -> dict[str, float]:
        """Returns, once, how the newest save went that has ended: numbers for the metrics. {} where none has."""
        times, self._times = self._times, {}
        return times

    def wait(self) -> None:
        """Returns when no save is under way. Raises RunStoppedError when the last one failed."""
        self._join()
        if self._error is not None:
            (step, error), self._error = self._error, None
            raise self._failed(step, error) from error

    def is_saving(self) -> bool:
        """Whether a save is under way. Waits for nothing."""
        return self._saving is not None and self._saving.is_alive()

    def keep_newest(self, before: int) -> int | None:
        """Keeps the newest step before step `before` for good, also one that is still being saved.

        Returns the step; None where none was saved before. Waits for nothing.
        """
        return keep_newest(self.path, before, [self._coming] if self.is_saving() else [])

    def save_failed(self) -> bool:
        """Whether the last save ended in an error, and none has begun since. Waits for nothing."""
        return self._error is not None

    def may_retry(self) -> bool:
        """Whether another save may take the place of one that failed: not after `TRIES` in a row.

        Nor on several hosts: they learn of the failure one by one, and Orbax's barriers would not meet again.
        """
        return jax.process_count() == 1 and self._failures < TRIES

    def retry_at(self) -> float:
        """Returns from when on (`time.monotonic`) the next save should be tried: pauses grow with each failure."""
        return self._failed_at + PAUSE * 2 ** (self._failures - 1)

    def _join(self) -> None:
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def close(self) -> None:
        """`wait`, then lets go of Orbax's threads and of the lock."""
        try:
            self.wait()
        finally:
            if self._local is not None:
                self._local.wait()
            self._checkpointer.close()
            self.release()

    def restore(self, step: int | None, branches: Mapping[str, Any], opt_state: Any) -> Restored:
        """Reads a step back. Damaged steps are named in a warning.

        Args:
            step: which; None: the newest one whose files are as they were written.
            branches: name -> abstract module: leaves are `jax.ShapeDtypeStruct` with a sharding (`with_shardings`).
            opt_state: the optimizer's state, as abstract.

        Returns:
            The step, its arrays with those dtypes and shardings.

        Raises:
            ConfigError: no step is left (names the folder and the first bad file); a tensor is missing, superfluous or
                of another shape (names it and both shapes).
        """
        self.wait()
        there = self.steps()
        self._newest = max(there, default=None)
        if step is None and self._newest is not None and self._local is not None:
            is_own = lambda owner: owner["run"] == self.identity != "" and owner["base"] in there  # noqa: E731
            read = partial(self._read_step, branches=branches, opt_state=opt_state)
            if (local := self._local.read_newest(self._newest, is_own, read)) is not None:
                return local[1]
        candidates = there if step is None else [known for known in there if known == step]
        found, bad = read_newest(self.path, candidates, lambda known: self._read_saved(known, branches, opt_state))
        if found is None:
            named = "no usable checkpoint" if step is None else f"no usable checkpoint of step {step}"
            raise ConfigError(f"{steps_folder(self.path)} holds {named}" + (f": {bad}" if bad else ""))
        # Damaged steps are not removed until a good one is saved, but no longer count.
        self._damaged.update(known for known in candidates if known > found[0])
        return found[1]

    def _read_saved(self, step: int, branches: Mapping[str, Any], opt_state: Any) -> Restored:
        folder = step_folder(self.path, step)
        return self._read_step(folder, step, json.loads((folder / "data.json").read_text()), branches, opt_state)

    def _read_step(
        self, folder: epath.Path, step: int, data_state: dict[str, Any], branches: Mapping[str, Any], opt_state: Any
    ) -> Restored:
        modules = {name: self._read(folder, branch_folder(name), m, f"branch {name}") for name, m in branches.items()}
        return Restored(modules, self._read(folder, "opt_state", opt_state, "the optimizer state"), data_state, step)

    def _failed(self, step: int, error: BaseException) -> RunStoppedError:
        reason = str(error).partition("\n")[0] or type(error).__name__
        return RunStoppedError(f"saving step {step} in {self.path} failed: {reason}")

    def _read(self, folder: epath.Path, name: str, abstract: Any, what: str) -> Any:
        if leaves_by_name(abstract) and not (folder / name).exists():
            raise ConfigError(f"checkpoint {folder} has no {name}")
        return read_tree(folder / name, abstract, what)

    def _finish(self, step: int, began: float, times: dict[str, float]) -> None:
        """Waits in the background for the commit, then removes what is no longer kept."""
        try:
            self._checkpointer.wait_until_finished()
        except BaseException as error:
            self._note_failure(step, error)
            if jax.process_index() == 0:
                self._remove_failed()
            return
        self._failures, self._newest = 0, step
        seconds, size = time.monotonic() - began, times["checkpoint_bytes"]
        self._times = times | {"checkpoint_s": seconds, "checkpoint_gb_per_s": size / 1e9 / max(seconds, 1e-9)}
        log.info("step %d is saved: %.2f GB in %.1f s", step, size / 1e9, seconds)
        if self._local is not None:
            self._local.remove([known for known in self._local.steps() if known <= step])
        try:
            if jax.process_index() == 0:
                self._remove_old(step)
        except Exception as error:  # the step is saved; the next one removes them
            log.warning("old steps in %s could not be removed: %s", self.path, error)
        self._damaged.clear()

    def _note_failure(self, step: int, error: BaseException) -> None:
        self._failures, self._failed_at = self._failures + 1, time.monotonic()
        # Said now: the next save may be an hour away.
        log.error("%s (%d in a row)", self._failed(step, error), self._failures)
        self._error = (step, error)

    def _remove_old(self, saved: int) -> None:
        """Keeps the newest `keep` steps. Damaged ones go now, not before: `saved` is there to take their place."""
        # Damaged steps count for nothing: `keep` good ones stay.
        good = self.steps()
        kept = {*good[-self.keep :], saved}
        remove_old_steps(self.path, kept)

    def _remove_failed(self) -> None:
        """Removes what was written in part: a full disk must not stay full of it. A whole step stays, see below.

        Orbax reports the first write that fails, while others go on adding files for a moment.
        """
        # A bucket is not full, and one that is down would be asked for minutes: its next start cleans up.
        for _ in range(1 if is_url(self.path) else _REMOVALS):
            with suppress(Exception):
                if not remove_leftovers(self.path):
                    return
            time.sleep(_PAUSE)


def _trees(branches: Mapping[str, Any], opt_state: Any) -> dict[str, dict[str, Any]]:
    """Returns the trees of a step: folder name -> arrays by dotted name."""
    trees = {branch_folder(name): stored_names(module) for name, module in branches.items()}
    moments = stored_names(opt_state)
    return trees | ({"opt_state": moments} if moments else {})
