"""Traces of steps for XProf, and profiles that it takes of a run at work."""

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from baichuan_omni_jax.errors import ConfigError

log = logging.getLogger(__name__)


class StepTrace:
    """Traces the steps of `span` into `WORKDIR/profile`, every host its own devices. Counts from 1, as metrics do.

    For XProf, TensorBoard's profile plugin or Perfetto.
    """

    def __init__(self, workdir: Path, span: Sequence[int] | None) -> None:
        self._folder, self._span = workdir / "profile", span or range(0)
        self._running = False

    def before(self, step: int) -> None:
        """To be called before a step is made ready."""
        if step in self._span and not self._running:
            self._running = self._unless_refused(lambda: jax.profiler.start_trace(str(self._folder)))

    def after(self, step: int, results: Any) -> None:
        """To be called when a step has been sent to the devices, with its results. Waits for the last step traced."""
        if self._running and step + 1 not in self._span:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            self._unless_refused(jax.profiler.stop_trace)

    def _unless_refused(self, work: Callable[[], object]) -> bool:
        """Whether `work()` was done; a trace that cannot be made or written ends no run."""
        try:
            work()
        except (OSError, RuntimeError) as error:
            log.warning("steps could not be traced into %s: %s", self._folder, error)
            return False
        return True


def serve_profiler(port: int) -> None:
    """Lets XProf take a profile of this process at any time. Raises ConfigError where the port is taken."""
    # JAX itself logs the failure, from C++, and goes on without a server.
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--profiler-port {port} cannot be used: {error}") from error
    jax.profiler.start_server(port)


def parse_span(text: str) -> range | None:
    """Parses `--profile`: `"3:6"` -> steps 3, 4, 5; an empty text is no steps. Raises ConfigError for anything else."""
    if not text:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 1 <= int(parts[0]) < int(parts[1]):
        raise ConfigError(f"--profile {text!r} is not START:STOP with 1 <= START < STOP (10:13 traces steps 10 to 12)")
    return range(int(parts[0]), int(parts[1]))
