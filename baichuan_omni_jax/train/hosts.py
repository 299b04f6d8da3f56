"""Several hosts in one training: how they join, what they must agree on, and which rows are whose."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from baichuan_omni_jax.config import ConfigError
from baichuan_omni_jax.sharding import ShardingRules

T = TypeVar("T")
_PACKAGES = ("baichuan_omni_jax", "data_pipelines")


def join(coordinator: str = "", hosts: int = 0, host: int = -1) -> None:
    """Joins the other hosts (jax.distributed): before anything else of JAX.

    On a TPU slice, under Slurm and under Open MPI nothing needs to be given. Elsewhere `coordinator` is `HOST:PORT` of
    host 0, `hosts` how many there are and `host` which one this is. Raises ConfigError when they cannot be found.
    """
    try:
        jax.distributed.initialize(
            coordinator or None, num_processes=hosts or None, process_id=None if host < 0 else host
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the hosts of this run cannot join: {error}") from error


def is_leader() -> bool:
    """Whether this is the host that writes numbers and talks to the user."""
    return jax.process_index() == 0


def share(text: str) -> list[str]:
    """`text` of every host, in the order of hosts. Every host must call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data))).reshape(-1)
    padded = np.pad(data, (0, int(lengths.max()) - len(data) + 1))
    gathered = multihost_utils.process_allgather(padded)
    return [bytes(row[:length]).decode() for row, length in zip(gathered, lengths, strict=True)]


def together(work: Callable[[], T]) -> T:
    """`work()` on every host. Where one raises ConfigError all do, so that none waits for a host that has left."""
    result, message = _attempt(work)
    _raise_on_all(message)
    return result


def leader_first(work: Callable[[], T]) -> T:
    """`work()` on host 0, then on the others: for work that builds something once and finds it afterwards.

    Raises ConfigError as `together`.
    """
    result = together(lambda: work() if is_leader() else None)
    return together(lambda: result if is_leader() else work())


def check_agreement(facts: Mapping[str, str]) -> None:
    """Raises ConfigError on every host, naming the first of `facts` that is not the same on all, and both values."""
    told = [json.loads(text) for text in share(json.dumps(dict(facts)))]
    for host, other in enumerate(told):
        for name in [*told[0], *(name for name in other if name not in told[0])]:
            here, there = told[0].get(name, "absent"), other.get(name, "absent")
            if here != there:
                raise ConfigError(f"the hosts disagree on {name}: {here} on host 0, {there} on host {host}")


def software() -> dict[str, str]:
    """What runs on this host: version of JAX, and a hash of this project's sources."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {"the version of jax": jax.__version__, "the code's version": digest.hexdigest()[:12]}


def rows_of_host(mesh: Mesh, rules: ShardingRules, rows: int) -> tuple[int, ...]:
    """Which of a global batch's `rows` this host's devices hold a part of, ascending.

    Two hosts share rows where `context` or `tensor` spans both: each then decodes them whole.
    """
    sharding = NamedSharding(mesh, rules.spec("batch"))
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(rows)[part]}))


def place_rows(
    batch: Mapping[str, np.ndarray], rows: tuple[int, ...], total: int, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The global batch of `total` rows, from this host's `rows` of it (in their order, all other axes whole)."""

    def put(name: str, value: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(total)[index[0]]
            start = rows.index(wanted[0])
            return value[(slice(start, start + len(wanted)), *index[1:])]

        return jax.make_array_from_callback((total, *value.shape[1:]), shardings[name], part)

    return {name: put(name, value) for name, value in batch.items()}


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except ConfigError as error:
        if jax.process_count() == 1:
            raise
        return None, str(error)


def _raise_on_all(message: str) -> None:
    for host, text in enumerate(share(message)):
        if text:
            raise ConfigError(f"host {host}: {text}")
