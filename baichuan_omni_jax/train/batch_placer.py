"""A step's rows on the mesh: whether they divide evenly, which of them this host reads, and where they go."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.sharding import ShardingRules

BatchAxes = Mapping[str, tuple[str | None, ...]]


def check_batch(run: RunConfig, omni: OmniConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises ConfigError naming the number of the configuration that the mesh, or another number, does not divide."""
    for name, value in {
        "train.accumulate": run.train.accumulate,
        "train.nonfinite_limit": run.train.nonfinite_limit,
        "eval.steps": run.eval.steps,
        "data.media_shards": run.data.media_shards,
        "data.context_block": run.data.context_block,
    }.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    shape, data = mesh.shape, run.data
    parts = {"mesh.data": shape["data"], "mesh.fsdp": shape["fsdp"], "train.accumulate": run.train.accumulate}
    _check("data.rows", data.rows, parts)
    if shape["context"] > 1:
        parts = {"mesh.context": shape["context"], "data.context_block": data.context_block}
        _check("data.budgets.tokens", data.budgets.tokens, parts)
    if "vision" in run.branches:
        _check("data.media_shards", data.media_shards, {f"mesh.{axis}": shape[axis] for axis in rules.axes("media")})
    abstract_batch(data.rows, data.budgets, omni, run.branches, mesh, rules)


def _check(name: str, size: int, parts: Mapping[str, int]) -> None:
    product = math.prod(parts.values())
    if size % product:
        named = " x ".join(f"{part} {count}" for part, count in parts.items())
        raise ConfigError(f"{name} {size} is not divisible by {product} ({named})")


def rows_of_host(mesh: Mesh, rules: ShardingRules, rows: int) -> tuple[int, ...]:
    """Which of a global batch's `rows` this host's devices hold a part of, ascending.

    Two hosts share rows where `context` or `tensor` spans both: each then decodes them whole.
    """
    sharding = NamedSharding(mesh, rules.spec("batch"))
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(rows)[part]}))


class BatchPlacer:
    """Puts batches on the mesh: the fields of `axes`, split as their logical axes say.

    A call takes this host's rows (`rows_of_host`, in that order, all other axes whole).
    """

    def __init__(self, rows: int, axes: BatchAxes, mesh: Mesh, rules: ShardingRules) -> None:
        self._total = rows
        self._here = {row: place for place, row in enumerate(rows_of_host(mesh, rules, rows))}
        self._shardings = {name: NamedSharding(mesh, rules.spec(*names)) for name, names in axes.items()}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global batch."""
        return {name: self._put(batch[name], sharding) for name, sharding in self._shardings.items()}

    def _put(self, value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            wanted = range(self._total)[index[0]]
            start = self._here[wanted[0]]
            return value[(slice(start, start + len(wanted)), *index[1:])]

        return jax.make_array_from_callback((self._total, *value.shape[1:]), sharding, part)
