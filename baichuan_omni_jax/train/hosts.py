"""Several hosts in one training: how they join, exchange text, fail together, and what they must agree on."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from baichuan_omni_jax.checkpoint.provenance import flatten
from baichuan_omni_jax.config import RunConfig, to_dict
from baichuan_omni_jax.coordination import COMPARED, Hosts, installed
from baichuan_omni_jax.errors import ConfigError, StorageError, storage_error

T = TypeVar("T")
# Where the data lie (the folders of a list have a number each), and how many processes read them.
_OWN_KEYS = ("data.root", "data.trusted_roots", "data.workers", "data.patience", "data.cache")
_PACKAGES = ("baichuan_omni_jax", "data_pipelines")


def join(coordinator: str = "", hosts: int = 0, host: int = -1) -> None:
    """Joins the other hosts (jax.distributed): before anything else of JAX.

    On a TPU slice, under Slurm and under Open MPI nothing needs to be given. Elsewhere `coordinator` is `HOST:PORT` of
    host 0, `hosts` how many there are and `host` which one this is. Raises ConfigError when they cannot be found.
    """
    # Hosts of CPU devices run a program where they send it: with XLA's threads between, two hosts were seen to wait for
    # each other without end on a busy machine (jax 0.10.2). Accelerators are not concerned.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            coordinator or None, num_processes=hosts or None, process_id=None if host < 0 else host
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the hosts of this run cannot join: {error}") from error


def warm_up_collectives(mesh: Mesh) -> None:
    """Opens the connections between hosts that the collectives of a step need, while all hosts are at the same place.

    Gloo opens one at the first use and waits 30 s for the others, who may be that much slower at compiling the step.
    """
    if jax.process_count() == 1:
        return
    # Every combination of axes that a collective of the step may go over.
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [group for count in range(1, len(axes) + 1) for group in combinations(axes, count)]
    sums = jax.shard_map(
        lambda x: [jax.lax.psum(x, group) for group in groups], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    # A meeting point first: the connections' own wait is short.
    all_gather_str("")
    jax.block_until_ready(jax.jit(sums)(np.float32(1)))


def host_name() -> str:
    """Returns what files of this host are called by."""
    return f"host_{jax.process_index()}"


def is_process_zero() -> bool:
    """Whether this is the host that writes numbers and talks to the user."""
    return jax.process_index() == 0


def all_gather_str(text: str) -> list[str]:
    """Gathers `text` of every host, in the order of hosts. Every host must call it.

    By the coordination service: no device waits meanwhile, however long one of the hosts takes to come here.
    """
    return Hosts.joined().meet(text)


def as_process_zero(find: Callable[[], T]) -> T:
    """Returns what `find()` returns on host 0, any JSON: for what hosts might see differently, as a folder's files.

    Raises ConfigError as `on_all_hosts`.
    """
    found = on_all_hosts(lambda: find() if is_process_zero() else None)
    return json.loads(all_gather_str(json.dumps(found))[0])


def on_all_hosts(work: Callable[[], T]) -> T:
    """Runs `work()` on every host. Where one raises ConfigError or StorageError all do, so that none waits for a host
    that has left; an OSError becomes one of the two.
    """
    result, message = None, ""
    try:
        result = work()
    except (ConfigError, StorageError, OSError) as raised:
        error = storage_error(raised) if isinstance(raised, OSError) else raised
        if jax.process_count() == 1:
            raise error from raised.__cause__ if error is raised else raised
        message = f"{'storage' if isinstance(error, StorageError) else 'config'} {error}"
    # No host may leave alone: the others would wait for it in the next collective.
    for host, text in enumerate(all_gather_str(message)):
        if text:
            kind, _, text = text.partition(" ")
            raise (StorageError if kind == "storage" else ConfigError)(f"host {host}: {text}")
    return cast(T, result)  # there was no error, on this host neither


def process_zero_first(work: Callable[[], T]) -> T:
    """Runs `work()` on host 0, then on the others: for work that builds something once and finds it afterwards.

    The others wait for minutes or hours, and their devices for nothing (`all_gather_str`).

    Raises ConfigError and StorageError as `on_all_hosts`.
    """
    result = on_all_hosts(lambda: work() if is_process_zero() else None)
    return on_all_hosts(lambda: cast(T, result) if is_process_zero() else work())


def check_agreement(facts: Mapping[str, str]) -> None:
    """Raises ConfigError on every host, naming the first of `facts` that is not the same on all, and both values."""
    facts_of = [json.loads(text) for text in all_gather_str(json.dumps(dict(facts)))]
    for host, other in enumerate(facts_of):
        for name in [*facts_of[0], *(name for name in other if name not in facts_of[0])]:
            here, there = facts_of[0].get(name, "absent"), other.get(name, "absent")
            if here != there:
                raise ConfigError(f"the hosts disagree on {name}: {here} on host 0, {there} on host {host}")


def version_facts() -> dict[str, str]:
    """Collects what runs on this host: versions of what all hosts must have alike, and a hash of this project's
    sources.
    """
    # Names and contents: a file that was moved is another version.
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    versions = {f"the version of {name}": installed(name) or "absent" for name in COMPARED}
    return versions | {"the code's version": digest.hexdigest()[:12]}


def run_facts(run: RunConfig) -> dict[str, str]:
    """Lists the configuration, key by key; without those that a host may have to itself."""
    keys = flatten(to_dict(run))
    return {name: repr(value) for name, value in keys.items() if not name.startswith(_OWN_KEYS)}


def wait_for(path: epath.Path, seconds: float = 60.0) -> None:
    """Waits until `path` is there: a file that host 0 wrote is seen by the others a little later on some file systems.

    Raises ConfigError when it does not appear.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ConfigError(f"{path}, written by host 0, is not to be seen: all hosts must have the same workdir")
        time.sleep(0.5)
