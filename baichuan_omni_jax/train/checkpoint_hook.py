"""When a run saves its state: at its steps, at its end, and again where a save failed."""

import time
from collections.abc import Callable, Mapping

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import RunStoppedError
from baichuan_omni_jax.train.alerts import AlertKind, AlertLog
from baichuan_omni_jax.train.hooks import Hook, RunProgress
from baichuan_omni_jax.train.input import DocumentFailures
from baichuan_omni_jax.train.state import Arrays, StepSpec, to_checkpoint


class CheckpointHook(Hook):
    """Saves after every `checkpoint.every` steps and after the last one, in the background.

    After every `checkpoint.local_every` others the step is kept on the hosts' own disks.

    Args:
        spec: the run's step.
        omni: the model's sizes, saved beside the weights.
        workdir: where steps are saved.
        originals: frozen parameters as checkpoints hold them (`from_checkpoint`).
        trained_before: by branch, the steps that it had been trained for when this run began.
        failures: documents that failed to decode, which hosts tell each other at every save.
        tokenizer_json: the text tokenizer, saved beside the weights.
        saved_step: the newest step that is saved already.
        before_save: called before each save: what a run that resumes from it will want to find.
        alerts: where it is told that saves take longer than what lies between them.
    """

    doing = "saving"

    def __init__(
        self,
        spec: StepSpec,
        omni: OmniConfig,
        workdir: Workdir,
        originals: Arrays,
        *,
        trained_before: Mapping[str, int],
        failures: DocumentFailures,
        tokenizer_json: str,
        saved_step: int,
        before_save: Callable[[], object],
        alerts: AlertLog,
    ) -> None:
        self._spec, self._omni, self._workdir, self._originals = spec, omni, workdir, originals
        self._trained_before, self._failures = dict(trained_before), failures
        self._tokenizer_json, self._saved_step = tokenizer_json, saved_step
        self._before_save, self._alerts = before_save, alerts

    def is_due(self, step: int) -> bool:
        return self._is_save_due(step) or self._is_local_due(step)

    def _is_local_due(self, step: int) -> bool:
        every = self._spec.task.run.checkpoint.local_every
        # Not the last step: it goes to the workdir.
        return every > 0 and step > 0 and step % every == 0 and step < self._spec.task.run.train.steps

    def _is_save_due(self, step: int) -> bool:
        # A save that failed is made good by the state of now: its own has been trained on since.
        again = self._workdir.save_failed() and self._workdir.may_retry()
        due = step > 0 and step % self._spec.task.run.checkpoint.every == 0
        return due or (again and time.monotonic() >= self._workdir.retry_at())

    def act(self, progress: RunProgress) -> None:
        if self._is_save_due(progress.step) or not self._is_local_due(progress.step):
            self._save(progress)
            return
        self._before_save()
        branches, opt_state = to_checkpoint(self._spec, progress.state, self._originals)
        self._failures.share_among_hosts()
        self._workdir.save_local(progress.step, branches, opt_state, progress.data_state or {})

    def _save(self, progress: RunProgress) -> None:
        if self._workdir.is_saving():
            text = f"the save of step {self._saved_step} is still under way, and the run waits: raise checkpoint.every"
            self._alerts.tell(AlertKind.SLOW_SAVE, progress.step, text)
        self._before_save()
        # The data's state leaves out what failed on any host, so a resumed run counts it on all.
        self._failures.share_among_hosts()
        branches, opt_state = to_checkpoint(self._spec, progress.state, self._originals)
        # Steps of each branch, over all stages that trained it.
        trained = dict(self._trained_before)
        for name in {path.split(".")[0] for path in progress.state.trainable}:
            trained[name] = trained.get(name, 0) + progress.step
        self._workdir.save(
            progress.step,
            branches,
            opt_state,
            progress.data_state or {},
            self._omni,
            self._tokenizer_json,
            trained={name: trained.get(name, 0) for name in branches},
        )
        self._saved_step = progress.step

    def finish(self, progress: RunProgress) -> None:
        # The last step, if none of `checkpoint.every` was it; then the background writes are awaited.
        if self._saved_step != progress.step:
            self._save(progress)
        while True:
            try:
                return self._workdir.wait()
            except RunStoppedError:
                if not self._workdir.may_retry():
                    raise
                time.sleep(max(0.0, self._workdir.retry_at() - time.monotonic()))
                self._save(progress)
