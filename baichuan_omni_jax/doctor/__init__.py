"""Looks a machine over before a run: versions, devices, storage, kernels, rates, one step; a line and a verdict each.

`CHECKS` are all of them, in the order in which they run; `examine` runs them. A check is a function of `Setting` that
yields lines: to add one, write it beside those it is like, and name it here.
"""

import importlib
from collections.abc import Callable, Iterable

from baichuan_omni_jax.doctor.machine import check_devices, check_disks, check_host
from baichuan_omni_jax.doctor.report import Check, Hosts, Line, Setting, Verdict, examine, lines_of_all_hosts
from baichuan_omni_jax.doctor.software import check_versions
from baichuan_omni_jax.doctor.workdir import check_workdir

__all__ = ["CHECKS", "Check", "Hosts", "Line", "Setting", "Verdict", "examine", "lines_of_all_hosts"]


def _on_devices(module: str, function: str) -> Callable[[Setting], Iterable[Line]]:
    """Returns a check of a module that is imported when it runs: its imports fail where JAX is not as it should be."""

    def run(setting: Setting) -> Iterable[Line]:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(setting)

    return run


# What needs no device comes first: without a device the others cannot be tried.
CHECKS: tuple[Check, ...] = (
    Check("versions", check_versions),
    Check("host", check_host),
    Check("disk", check_disks),
    Check("workdir", check_workdir),
    Check("devices", check_devices),
    Check("kernels", _on_devices("kernels", "check_kernels"), on_devices=True, long=True),
    Check("rates", _on_devices("rates", "check_rates"), on_devices=True, long=True),
    Check("kernel times", _on_devices("kernels", "check_kernel_times"), on_devices=True, long=True),
    Check("collectives", _on_devices("rates", "check_collectives"), on_devices=True, together=True),
    Check("step", _on_devices("step", "check_step"), on_devices=True, together=True, long=True),
)
