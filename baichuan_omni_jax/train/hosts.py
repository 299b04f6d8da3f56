"""Several hosts, one after the other."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")


def leader_first(work: Callable[[], T]) -> T:
    """`work()` on process 0 first, then on the others: for work that builds something once and finds it afterwards."""
    if jax.process_index() == 0:
        result = work()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("leader_first")
    return result if jax.process_index() == 0 else work()
