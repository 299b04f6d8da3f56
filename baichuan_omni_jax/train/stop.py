"""How a run learns that its machine is wanted back: SIGTERM, on this host or another."""

import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from baichuan_omni_jax.train.hooks import Hook


class StopSignal(Hook):
    """Listens for SIGTERM until `close`: how a run learns that its machine is wanted back.

    On several hosts JAX's preemption service has the signal since `jax.distributed.initialize`: it carries the notice
    of any host to all of them and chooses a step that none has reached yet, so that all stop after the same one.
    """

    def __init__(self) -> None:
        self.received = False
        self._several = jax.process_count() > 1
        self._old: Any = None
        # Several hosts: the service handles the signal, a handler of ours would hide it.
        if not self._several:
            try:
                self._old = signal.signal(signal.SIGTERM, self._receive)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                return

    def should_stop(self, step: int) -> bool:
        """Every host must ask at every step; all get the same answer."""
        if self._several:
            self.received = self.received or multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def close(self) -> None:
        """Puts the handler from before back."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
