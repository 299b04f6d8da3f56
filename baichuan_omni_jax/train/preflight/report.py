"""What preflight finds out about a run on a topology: bytes on one chip, collectives and model FLOPs of one step."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.chips import chip_of
from baichuan_omni_jax.flops.omni import flops_by_branch, flops_by_part
from baichuan_omni_jax.train.preflight.buffers import Temporary
from baichuan_omni_jax.train.preflight.build import Arguments, Built, build, bytes_on_a_chip, set_up
from baichuan_omni_jax.train.preflight.collectives import collectives_of
from baichuan_omni_jax.train.preflight.packing import Packing
from baichuan_omni_jax.train.preflight.suggest import suggestions
from baichuan_omni_jax.train.preflight.topology import devices_of
from baichuan_omni_jax.train.state import Setup


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of parameters: how many there are, and their and their optimizer's bytes on one chip."""

    name: str
    parameters: int
    learning_rate: float | None
    parameter_bytes: int
    optimizer_bytes: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over the same mesh axes: how many a step runs on a chip, and the bytes they move.

    `bytes` counts whole arrays, of a gather its result, times the loops' lengths.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run on one topology. All bytes are one chip's; `peak_bytes` is what the program holds at once.

    `args_bytes` are parameters, optimizer state and batch; outputs that do not reuse them are `output_bytes`.
    `model_flops` are one step's, of all chips together, for rows as `packing` says. `collectives` is None where the
    compiler refused the program: it is then not known.
    """

    name: str
    topology: str
    slices: int
    chips: int
    device_kind: str
    mesh: dict[str, int]
    groups: tuple[Group, ...]
    batch_bytes: int
    args_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    largest: tuple[Temporary, ...]
    collectives: tuple[Traffic, ...] | None
    model_flops: dict[str, float]
    flops_by_part: dict[str, float]
    counts: dict[str, int]
    packing: str
    suggestions: list[str]
    seconds: float
    jax: str

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain dicts and lists."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["groups"] = [vars(group) for group in self.groups]
        plain["collectives"] = self.collectives and [vars(traffic) for traffic in self.collectives]
        plain["largest"] = [vars(temporary) for temporary in self.largest]
        return plain


def preflight(run: RunConfig, omni: OmniConfig, topology: str, packing: Packing | None = None) -> Report:
    """Compiles the run's step for `mesh.slices` slices of `topology` and reports. Needs libtpu, but no TPU.

    Raises ConfigError where the topology is unknown, or mesh, budgets, groups and model do not fit it.
    """
    setup, arguments = set_up(run, omni, devices_of(topology, run.mesh.slices))
    return describe(run, omni, topology, setup, arguments, build(setup, run, arguments), packing or Packing())


def describe(
    run: RunConfig, omni: OmniConfig, topology: str, setup: Setup, arguments: Arguments, built: Built, packing: Packing
) -> Report:
    """The report of a step that has been compiled."""
    memory, mesh = built.memory, dict(setup.mesh.shape)
    device = setup.mesh.devices.flat[0]
    chip = chip_of(device.device_kind)
    if chip is None:
        raise ConfigError(f"{topology}: {device.device_kind} is not a chip whose memory is known")
    available = memory.available or chip.hbm_bytes
    counts = packing.counts(run, omni)
    trainable = setup.groups.trainable
    parts = setup.task.parts()
    branches = flops_by_branch(parts, counts, trainable)
    total = sum(branches.values())
    return Report(
        name=run.name,
        topology=topology,
        slices=run.mesh.slices,
        chips=setup.mesh.devices.size,
        device_kind=device.device_kind,
        mesh=mesh,
        groups=group_sizes(run, setup, arguments),
        batch_bytes=bytes_on_a_chip(arguments.batch),
        args_bytes=memory.args,
        output_bytes=memory.outputs,
        temp_bytes=memory.temp,
        code_bytes=memory.code,
        peak_bytes=memory.peak,
        hbm_bytes=available,
        fits=memory.available is None and memory.peak <= available,
        largest=tuple(built.largest),
        collectives=_traffic(built.hlo, mesh) if built.hlo else None,
        model_flops=branches | {"total": total, "per_chip": total / setup.mesh.devices.size},
        flops_by_part=flops_by_part(parts, counts, trainable),
        counts=counts,
        packing=packing.sentence(),
        suggestions=[] if memory.peak <= available else suggestions(run, mesh, memory, available),
        seconds=built.seconds,
        jax=jax.__version__,
    )


def group_sizes(run: RunConfig, setup: Setup, arguments: Arguments) -> tuple[Group, ...]:
    """In the order of the run's configuration, frozen ones included; one of which nothing trains has no rate."""
    values = arguments.trainable | arguments.frozen
    group_of = setup.groups.trainable | setup.groups.frozen
    learns = set(setup.groups.trainable.values())
    sizes, own, moments = defaultdict(int), defaultdict(int), defaultdict(int)
    for name, value in values.items():
        sizes[group_of[name]] += value.size
        own[group_of[name]] += bytes_on_a_chip(value)
    for path, leaf in jax.tree_util.tree_flatten_with_path(arguments.opt_state)[0]:
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in setup.groups.trainable), None)
        if name is not None:
            moments[group_of[name]] += bytes_on_a_chip(leaf)
    return tuple(
        Group(
            name=group.name,
            parameters=sizes[group.name],
            learning_rate=group.learning_rate if group.name in learns else None,
            parameter_bytes=own[group.name],
            optimizer_bytes=moments[group.name],
        )
        for group in run.optimizer.groups
    )


def _traffic(hlo: str, mesh: dict[str, int]) -> tuple[Traffic, ...]:
    """Collectives by kind and axes, most bytes first."""
    found = defaultdict(lambda: [0, 0])
    for one in collectives_of(hlo, mesh):
        entry = found[one.kind, one.axes]
        entry[0] += one.times
        entry[1] += one.times * one.bytes
    traffic = [Traffic(kind=k, axes=a, count=count, bytes=size) for (k, a), (count, size) in found.items()]
    return tuple(sorted(traffic, key=lambda one: -one.bytes))
