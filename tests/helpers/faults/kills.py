"""SIGKILL at a chosen moment of a training process, and what the process was doing."""

import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers.faults.uninterrupted import committed, last_step, leftovers
from tests.helpers.micro import wait_until
from tests.helpers.proofs import HANG

# checkpoint.every of the runs that are killed: more time between saves than configs/micro.py leaves.
EVERY = 4


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after `step` is in metrics.jsonl (0: after the start), or with `saving` after its save began."""

    step: int
    delay: float
    saving: bool = False

    def not_before(self, step: int) -> "Moment":
        """This moment, or if a run has come further already the first like it after `step`."""
        if not self.step or self.step > step:
            return self
        return replace(self, step=(step // EVERY + 1) * EVERY if self.saving else step + 1)

    def has_come(self, workdir: Path) -> bool:
        if self.saving:
            # A save that was over before it was seen counts too: waiting on would miss the run.
            return any((workdir / "checkpoints").glob(f"{self.step}*"))
        return last_step(workdir) >= self.step

    def __str__(self) -> str:
        return f"{self.delay:.3f} s after {'the save of ' if self.saving else ''}step {self.step}"


@dataclass(frozen=True)
class Kill:
    """What a process was `doing`: "starting", "training", "saving" or, if it had ended by itself, "nothing".

    `last` is the last step in metrics.jsonl then, `saved` the steps whose checkpoints were whole.
    """

    moment: Moment
    doing: str
    last: int
    saved: list[int]

    def __str__(self) -> str:
        return f"{self.moment}: {self.doing}, step {self.last} done, {self.saved} saved"


def kill_at(process: subprocess.Popen, workdir: Path, moment: Moment) -> Kill:
    """Kills a process that has just been started."""
    before = _metrics(workdir)
    with process:
        if wait_until(process, lambda: moment.has_come(workdir)):
            time.sleep(moment.delay)
            process.kill()
        process.communicate(timeout=HANG)
    if process.returncode != -signal.SIGKILL:
        doing = "nothing"
    elif _metrics(workdir) == before:
        doing = "starting"
    else:
        # Those of an earlier kill are gone when a run touches its numbers.
        doing = "saving" if leftovers(workdir) else "training"
    return Kill(moment, doing, last_step(workdir), committed(workdir))


def _metrics(workdir: Path) -> bytes | None:
    path = workdir / "metrics.jsonl"
    return path.read_bytes() if path.exists() else None
