"""The steps of a workdir: which are there, and which of them are whole."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS, verify_checksums

log = logging.getLogger(__name__)


def steps_folder(workdir: epath.Path) -> epath.Path:
    return workdir / "checkpoints"


def step_folder(workdir: epath.Path, step: int) -> epath.Path:
    return steps_folder(workdir) / str(step)


def committed_steps(workdir: epath.Path) -> list[int]:
    """Steps whose save was completed, ascending. Their files are not read."""
    if not steps_folder(workdir).is_dir():
        return []
    folders = [path for path in steps_folder(workdir).iterdir() if path.name.isdigit()]
    return sorted(int(path.name) for path in folders if (path / CHECKSUMS).exists())


def newest_good(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str] = ()) -> tuple[int | None, str]:
    """The last of ascending `steps` whose files are as they were written, and the first bad file met on the way.

    Each damaged step is named in a warning. The first host reads, the others are told. Returns (None, file) when
    there is none; the file is "" when no step was damaged.
    """
    step, bad = _newest_good_here(workdir, steps, skip) if jax.process_index() == 0 else (None, "")
    if jax.process_count() > 1:
        told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        step = None if told < 0 else told
    return step, bad


def _newest_good_here(workdir: epath.Path, steps: Sequence[int], skip: Sequence[str]) -> tuple[int | None, str]:
    first_bad = ""
    for step in reversed(steps):
        bad = verify_checksums(step_folder(workdir, step), skip)
        if bad is None:
            return step, first_bad
        path = step_folder(workdir, step) / bad
        first_bad = first_bad or str(path)
        log.warning("checkpoint of step %d is damaged and passed over: %s is missing or changed", step, path)
    return None, first_bad
