"""All that watches a run while it works: alerts, the watchdog, hosts beside each other, where the time goes."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.errors import list_some
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.alerts import AlertKind, AlertLog, StepAlerts, keep_good_step
from baichuan_omni_jax.train.hosts import is_process_zero
from baichuan_omni_jax.train.metrics import MetricsRecord, RunLog
from baichuan_omni_jax.train.state import StepSpec, TrainState
from baichuan_omni_jax.train.step import StepReplay
from baichuan_omni_jax.train.watchdog import Watchdog, describe_hosts

log = logging.getLogger(__name__)


class RunWatch:
    """Is told by the trainer what the run is at and what came of each step. Every host has one; the first one tells.

    Args:
        spec: the run's step; its configuration has the limits.
        folder: where alerts and stacks are written: the workdir, or a local copy of what is there.
        workdir: whose steps are kept when the run diverges.
        run_log: where goodput is counted; None on other hosts than the first.
        sync: called before a process that hangs is left: copies `folder` to where it belongs.
        leave_when_hung: whether a step that does not end ends the process.
    """

    def __init__(
        self,
        spec: StepSpec,
        folder: Path,
        workdir: Workdir,
        run_log: RunLog | None,
        sync: Callable[[], object],
        *,
        leave_when_hung: bool,
    ) -> None:
        config = spec.task.run.watch
        self._config, self._log, self._sync = config, run_log, sync
        self._replay = StepReplay(spec) if config.replay_every else None
        self.alerts = AlertLog(folder)
        # Numbers are the same on all hosts: one looks at them.
        self._rules: StepAlerts | None = None
        self._keep_good = workdir.keep_newest
        if is_process_zero():
            self._rules = StepAlerts(config, self.alerts, self._keep_good)
        self._watchdog = Watchdog(config, folder, Hosts.joined(), self._report_hang)
        if leave_when_hung:
            self._watchdog.start()

    def enter(self, step: int, doing: str, *, in_step: bool = True) -> None:
        """Notes what the main thread is at from now on (`Watchdog.enter`)."""
        self._watchdog.enter(step, doing, in_step=in_step)

    @contextmanager
    def beside(self, step: int, doing: str) -> Iterator[None]:
        """Notes that the run does something else than steps inside."""
        self.enter(step, doing, in_step=False)
        if self._log is None:
            yield
        else:
            with self._log.goodput.beside(doing):
                yield

    def finish_step(
        self, step: int, numbers: Mapping[str, float], parts: Mapping[str, float], idle: float
    ) -> MetricsRecord:
        """Looks at a step whose numbers are there.

        Args:
            step: its number.
            numbers: its metrics, as the devices returned them.
            parts: seconds of this host by name; `step_s` is the whole step.
            idle: seconds in which the devices had nothing to do for lack of rows.

        Returns:
            What belongs into its record besides: now and then each host's times by its number.
        """
        took = parts["step_s"]
        self._watchdog.finished(took, parts)
        if self._rules is None:
            return {}
        self._rules.check(step, numbers, took, min(idle, took))
        if not self._config.hosts_every or step % self._config.hosts_every:
            return {}
        means = self._watchdog.means_by_host()
        if len(means) < 2:
            return {}
        log.warning("step %d: %s", step, describe_hosts(means))
        return {f"host_{name}": {str(host): mean[name] for host, mean in means.items()} for name in parts}

    def replays(self, step: int) -> bool:
        """Whether a step is to be computed twice beforehand (`watch.replay_every`)."""
        return self._replay is not None and step % self._config.replay_every == 0

    def replay(self, step: int, state: TrainState, batch: Batch) -> float:
        """Computes a step twice where it is due, and tells which of its results differ; returns the seconds it took."""
        if self._replay is None or not self.replays(step):
            return 0.0
        began = time.perf_counter()
        with self.beside(step, "replaying a step"):
            differing = self._replay(state, batch)
        if differing and self._rules is not None:
            kept = keep_good_step(self._keep_good, step)
            text = f"a step computed twice had other bits: {list_some(differing)}; have the machine looked at; {kept}"
            self.alerts.tell(AlertKind.CORRUPTION, step, text)
        return time.perf_counter() - began

    def close(self) -> None:
        """Ends the watch, however the run ended."""
        self._watchdog.close()

    def _report_hang(self, step: int, sentence: str) -> None:
        """Leaves word of a hang, for whoever reads the workdir: on a thread of the watchdog."""
        if self._rules is not None:
            self.alerts.tell(AlertKind.HANG, step, sentence)
        self._sync()
