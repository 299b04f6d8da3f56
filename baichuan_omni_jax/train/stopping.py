"""SIGTERM: how a run learns that its machine is wanted back, and how all hosts stop after the same step."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Listens for SIGTERM until `close`.

    On several hosts JAX's preemption service has the signal since `jax.distributed.initialize`: it carries the notice
    of any host to all of them and chooses a step that none has reached yet.
    """

    def __init__(self) -> None:
        self.asked = False
        self._several = jax.process_count() > 1
        self._old = None
        if not self._several:
            try:
                self._old = signal.signal(signal.SIGTERM, self._ask)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def reached(self, step: int) -> bool:
        """Whether to stop after `step` finished steps. Every host must ask at every step; all get the same answer."""
        if self._several:
            self.asked = self.asked or multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def close(self) -> None:
        """Puts the handler from before back."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _ask(self, *_: object) -> None:
        self.asked = True
