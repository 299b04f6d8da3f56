"""Stands in for the coordination service of jax.distributed: hosts are threads, or were told before what others say."""

import time

from baichuan_omni_jax.doctor import Hosts


class Service:
    """A service whose silent keys are given up at once."""

    def __init__(self, **told: str):
        self.told = {f"told/{name.replace('__', '/')}": text for name, text in told.items()}

    def key_value_set(self, key: str, text: str) -> None:
        self.told[key] = text

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        # Another thread may be about to say it.
        end = time.monotonic() + min(milliseconds / 1000, 0.2)
        while key not in self.told and time.monotonic() < end:
            time.sleep(0.01)
        if key not in self.told:
            raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
        return self.told[key]


def hosts_that_say(name: str, *others: str | None) -> Hosts:
    """Host 0 of several of which the others have said these texts under `name`, None nothing."""
    told = {f"told/{name}/{host}": text for host, text in enumerate(others, 1) if text is not None}
    service = Service()
    service.told |= told
    return Hosts(0, 1 + len(others), service)
