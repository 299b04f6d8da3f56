"""Hosts that talk without their devices: by the coordination service of jax.distributed, which host 0 runs.

A collective needs the same versions and working devices on all hosts, and on a TPU slice all of them to wait inside a
program; text needs neither (docs/decisions/0109, 0112). Nothing here needs JAX to be whole: `doctor` reads it too.
"""

import itertools
import time
from importlib import metadata
from typing import Any

# What all hosts must have alike, as a step is compiled by it, or a checkpoint and its rows are written by it.
COMPARED = (
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorstore",
    "numpy",
    "pillow",
    "av",
)
# Milliseconds that a barrier waits at most: for hosts of which one indexes a data set, or compiles. One that dies is
# noticed by its missing heartbeat much sooner.
_DAY = 24 * 3600 * 1000
# Meetings of this process: all hosts have the same ones, in the same order.
_MEETINGS = itertools.count(1)


class Hosts:
    """The joined hosts: text that all tell, and keys that each may set and read."""

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index, self.count, self._client = index, count, client

    @classmethod
    def joined(cls) -> "Hosts":
        """Returns those of `jax.distributed`; one host where it was not initialized. Starts no device."""
        # jax.process_index() would start the devices, and there is no public door to the client (jax 0.10.2).
        from jax._src import distributed

        state = distributed.global_state
        return cls() if state.client is None else cls(state.process_id, state.num_processes or 1, state.client)

    def gather(self, name: str, text: str, seconds: float = 300.0) -> list[str | None]:
        """Returns `text` of every host in their order; None for a host that did not say it in time.

        Args:
            name: what is told: every host calls with the same names, each once.
            text: what this host tells.
            seconds: how long to wait for all of them together.
        """
        if self._client is None:
            return [text]
        self._client.key_value_set(f"told/{name}/{self.index}", text)
        end, told = time.monotonic() + seconds, []
        for host in range(self.count):
            # At least a moment for each: one silent host must not make those after it silent too.
            left = max(end - time.monotonic(), 1.0)
            try:
                told.append(self._client.blocking_key_value_get(f"told/{name}/{host}", int(1000 * left)))
            except RuntimeError:
                told.append(None)
        return told

    def meet(self, text: str) -> list[str]:
        """Returns `text` of every host in their order, once all have come here: as long as that takes.

        Raises RuntimeError when a host is gone.
        """
        if self._client is None:
            return [text]
        number = next(_MEETINGS)
        folder = f"meeting/{number}/"
        self._client.key_value_set(f"{folder}{self.index}", text)
        self._client.wait_at_barrier(f"meeting_{number}", _DAY)
        told = dict(self._client.key_value_dir_get(folder))
        # Whoever is here has read what was told at the meeting before.
        if self.index == 0 and number > 1:
            self._client.key_value_delete(f"meeting/{number - 1}/")
        return [told[f"{folder}{host}"] for host in range(self.count)]

    def put(self, key: str, text: str) -> None:
        """Sets a key, for all hosts to read. Alone nobody reads it. Raises RuntimeError when host 0 is gone."""
        if self._client is not None:
            self._client.key_value_set(key, text, allow_overwrite=True)

    def wait(self, key: str) -> str:
        """Returns what a key is set to, once it is. For several hosts. Raises as `put`."""
        while True:
            try:
                # A second at a time: meanwhile no signal is heard.
                return self._client.blocking_key_value_get(key, 1000)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def remove(self, folder: str) -> None:
        """Removes all keys that begin with `folder`, which ends with a slash. Raises as `put`."""
        if self._client is not None:
            self._client.key_value_delete(folder)

    def has(self, key: str) -> bool:
        """Whether a key is set. Alone none is. Raises as `put`."""
        if self._client is None:
            return False
        try:
            self._client.key_value_try_get(key)
        except RuntimeError as error:
            if "NOT_FOUND" in str(error):
                return False
            raise
        return True

    def below(self, folder: str) -> dict[str, str]:
        """Returns all keys that begin with `folder/`, without it, and what they are set to. Raises as `put`."""
        if self._client is None:
            return {}
        return {key.removeprefix(f"{folder}/"): text for key, text in self._client.key_value_dir_get(f"{folder}/")}


def installed(name: str) -> str:
    """Returns the version of an installed package, "" where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
