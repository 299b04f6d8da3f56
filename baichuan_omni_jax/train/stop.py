"""How a run learns that its machine is wanted back: SIGTERM, on this host or another.

What it then does depends on what it is at. Until the first step of this start is done nothing would be lost, so it
leaves at once, also in the middle of a compilation. An evaluation is broken off, the state is saved, and the next start
evaluates. A step or a save is finished first.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jax.experimental import multihost_utils

from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.train.hooks import Hook

log = logging.getLogger(__name__)

# The key of the coordination service that JAX's preemption service sets when any host has had SIGTERM (jax 0.10.2).
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
# Set by each host that has done a step since its start.
_BEGUN = "stop/begun"
# Seconds that Python has to unwind before the process is ended where it is: in a compilation no signal reaches it.
_UNWIND = 5.0
# Seconds between looks at the notice, and that host 0, which has the service, stays for the others to see it.
_LOOK, _STAY = 1.0, 3.0


class StopSignal(Hook):
    """Listens for SIGTERM until `close`.

    On several hosts JAX's preemption service has the signal since `jax.distributed.initialize`: it carries the notice
    of any host to all of them and chooses a call of `should_stop` that none has reached yet, so that all stop there.

    Args:
        leave: the exit code of a process that has done no step yet: it may leave at once, as SIGTERM comes. None: it
            does a step first.
        end: ends the process.
    """

    def __init__(self, leave: int | None = None, end: Callable[[int], object] = os._exit) -> None:
        self.received = False
        self.interrupted = False  # whether an evaluation was broken off, which the next start is to repeat
        self._hosts = Hosts.joined()
        self._several = self._hosts.count > 1
        self._leave, self._end = leave, end
        self._at_once, self._breakable = leave is not None, False
        self._calls = 0
        self._old: Any = None
        self._pipe: tuple[int, int] | None = None
        # Several hosts: the service handles the signal, a handler of ours would hide it.
        if self._several:
            if self._at_once:
                threading.Thread(target=self._look_for_notice, name="stop", daemon=True).start()
            return
        try:
            self._old = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            return
        if self._at_once:
            # Written to in C as the signal comes, whatever the main thread is at.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            signal.set_wakeup_fd(self._pipe[1])
            threading.Thread(target=self._wait_for_signal, args=self._pipe[:1], name="stop", daemon=True).start()

    def begin(self) -> None:
        """Notes that a step has been done since the start: from now on there is something to save."""
        if self._at_once and self._several:
            self._hosts.put(f"{_BEGUN}/{self._hosts.index}", "yes")
        self._at_once = False

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Lets SIGTERM break off what is done inside: on one host anywhere, on several at `check`."""
        self._breakable = True
        try:
            # It may have come just before.
            if self.received and not self._several:
                raise KeyboardInterrupt
            yield
        except KeyboardInterrupt:
            # Ctrl-C, and a process that leaves at once, end more than this.
            if not self.received or self._at_once:
                raise
            self.interrupted = True
        finally:
            self._breakable = False

    def check(self) -> None:
        """Raises KeyboardInterrupt inside `breakable` on all hosts, where one has had SIGTERM. All must call it."""
        if self._several and self._breakable and self.should_stop(0):
            raise KeyboardInterrupt

    def should_stop(self, step: int) -> bool:
        """Every host must ask at every step; all get the same answer."""
        if self._several:
            # Counted here, as an evaluation asks too: the service wants numbers that only rise.
            self._calls += 1
            self.received = self.received or multihost_utils.reached_preemption_sync_point(self._calls)
        return self.received

    def close(self) -> None:
        """Puts the handler from before back."""
        self._at_once = False
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
            self._pipe = None
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
            self._old = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if self._at_once or self._breakable:
            raise KeyboardInterrupt

    def _wait_for_signal(self, pipe: int) -> None:
        """Ends a process that does not unwind, as its main thread is outside of Python."""
        try:
            # The number of each signal that has a handler in Python.
            while (found := os.read(pipe, 1)) and found[0] != signal.SIGTERM:
                pass
        finally:
            os.close(pipe)
        if found:
            time.sleep(_UNWIND)
            if self._at_once:
                self._leave_now()

    def _look_for_notice(self) -> None:
        """Ends the process of this host where any has had SIGTERM, and none has done a step."""
        while self._at_once:
            time.sleep(_LOOK)
            try:
                if not self._hosts.has(_NOTICE):
                    continue
                # One that has begun saves: all stop after the same step, as the service chooses.
                if self._hosts.below(_BEGUN):
                    return
            except RuntimeError:  # host 0 has left: it has seen the notice, or died, and JAX ends this one
                continue
            if self._hosts.index == 0:
                time.sleep(_STAY)
            if self._at_once:
                self._leave_now()

    def _leave_now(self) -> None:
        print("stopped by SIGTERM before the first step of this start; nothing is lost", file=sys.stderr, flush=True)
        for child in multiprocessing.active_children():
            child.kill()
        assert self._leave is not None
        self._end(self._leave)
