"""What preflight finds out about a run on a topology: bytes on one chip, collectives and model FLOPs of one step."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import jax

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.terms import chip_of, flops_by_branch, flops_by_term
from baichuan_omni_jax.train.preflight.compile import (
    CompiledProgram,
    Memory,
    abstract_step,
    bytes_on_a_chip,
    compile_for_devices,
    devices_of,
    usable_bytes,
)
from baichuan_omni_jax.train.preflight.fit import RematFit, fit_remat, with_remat
from baichuan_omni_jax.train.preflight.hlo import Temporary, collectives_of
from baichuan_omni_jax.train.preflight.packing import Packing
from baichuan_omni_jax.train.preflight.step_time import PRODUCT_SHARE, StepTime, predict, program_work
from baichuan_omni_jax.train.state import FIT, StepSpec, TrainState


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
    `remat` is what was compiled, `remat_fit` how it was found where the run left it open. `model_flops` are one step's,
    of all chips together, for rows as `packing` says. `collectives` is None where the compiler refused the program: it
    is then not known. `time` is predicted, for TPUs alone.
    """

    name: str
    topology: str
    slices: int
    rows: int
    chips: int
    device_kind: str
    mesh: dict[str, int]
    remat: str
    remat_fit: RematFit | None
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
    flops_by_term: dict[str, float]
    counts: dict[str, int | float]
    time: StepTime | None
    packing: str
    suggestions: list[str]
    seconds: float
    jax: str

    def to_json(self) -> dict[str, Any]:
        """Turns everything into plain dicts and lists."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["time"] = self.time and vars(self.time)
        plain["remat_fit"] = self.remat_fit and vars(self.remat_fit)
        plain["groups"] = [vars(group) for group in self.groups]
        plain["collectives"] = self.collectives and [vars(traffic) for traffic in self.collectives]
        plain["largest"] = [vars(temporary) for temporary in self.largest]
        return plain


def preflight(run: RunConfig, omni: OmniConfig, topology: str, packing: Packing | None = None) -> Report:
    """Compiles the run's step for `mesh.slices` slices of `topology` and reports.

    Needs libtpu, or for GPUs JAX's CUDA plugin, but no device.

    Raises ConfigError where the topology is unknown, or mesh, budgets, groups and model do not fit it.
    """
    devices, fit, built = devices_of(topology, run.mesh.slices), None, None
    # What layers keep is found first where it is left open: the run is then reported as it would be run.
    if run.compute.remat == FIT:
        available = usable_bytes(devices[0])
        if available is None:
            raise ConfigError(f"{topology}: {devices[0].device_kind} is not a chip whose memory is known")
        fit, built = fit_remat(run, omni, devices, available)
        run = with_remat(run, fit.remat)
    # Shapes, program, and what can be read off it.
    spec, state, batch = abstract_step(run, omni, devices)
    built = built or compile_for_devices(spec, state, batch)
    return describe(run, omni, topology, spec, state, batch, built, packing or Packing(), fit)


def describe(
    run: RunConfig,
    omni: OmniConfig,
    topology: str,
    spec: StepSpec,
    state: TrainState,
    batch: dict[str, jax.ShapeDtypeStruct],
    built: CompiledProgram,
    packing: Packing,
    fit: RematFit | None = None,
) -> Report:
    """Makes the report of a step that has been compiled; `fit` says how its `compute.remat` was found."""
    memory, mesh = built.memory, dict(spec.mesh.shape)
    device = spec.mesh.devices.flat[0]
    # What the compiler allows, where it said so.
    available = memory.available or usable_bytes(device)
    if available is None:
        raise ConfigError(f"{topology}: {device.device_kind} is not a chip whose memory is known")
    counts = packing.counts(run, omni)
    trainable = spec.groups.trainable
    # FLOPs: by the formulas of the training metrics, for rows as `packing` fills them.
    terms = spec.task.flop_terms()
    branches = flops_by_branch(terms, counts, trainable)
    total = sum(branches.values())
    return Report(
        name=run.name,
        topology=topology,
        slices=run.mesh.slices,
        rows=run.data.rows,
        chips=spec.mesh.devices.size,
        device_kind=device.device_kind,
        mesh=mesh,
        remat=run.compute.remat,
        remat_fit=fit,
        groups=group_sizes(run, spec, state),
        batch_bytes=bytes_on_a_chip(batch),
        args_bytes=memory.args,
        output_bytes=memory.outputs,
        temp_bytes=memory.temp,
        code_bytes=memory.code,
        peak_bytes=memory.peak,
        hbm_bytes=available,
        fits=memory.available is None and memory.peak <= available,
        largest=tuple(built.largest),
        collectives=_traffic(built.hlo, mesh) if built.hlo else None,
        model_flops=branches | {"total": total, "per_chip": total / spec.mesh.devices.size},
        flops_by_term=flops_by_term(terms, counts, trainable),
        counts=counts,
        time=_time(run, omni, spec, built, counts, memory, packing, total),
        packing=packing.sentence(),
        suggestions=[] if memory.peak <= available else suggestions(run, mesh, memory, available),
        seconds=built.seconds,
        jax=jax.__version__,
    )


def _time(
    run: RunConfig,
    omni: OmniConfig,
    spec: StepSpec,
    built: CompiledProgram,
    counts: dict[str, int | float],
    memory: Memory,
    packing: Packing,
    model_flops: float,
) -> StepTime | None:
    chip = chip_of(spec.mesh.devices.flat[0].device_kind)
    # The model of time knows TPUs and the language model's step.
    if not built.hlo or chip is None or chip.name not in PRODUCT_SHARE or run.task != "omni":
        return None
    work = program_work(built.hlo, spec, omni, counts, packing.visited_pairs(run), memory.args)
    return predict(work, chip, model_flops / spec.mesh.devices.size)


def group_sizes(run: RunConfig, spec: StepSpec, state: TrainState) -> tuple[Group, ...]:
    """Sizes the run's groups in their order, frozen ones included; one of which nothing trains has no rate."""
    # Parameters by group, and what the optimizer keeps of each: moments are found by the parameter's name.
    values = state.trainable | state.frozen
    group_of = spec.groups.trainable | spec.groups.frozen
    learns = set(spec.groups.trainable.values())
    sizes, own, moments = defaultdict(int), defaultdict(int), defaultdict(int)
    for name, value in values.items():
        sizes[group_of[name]] += value.size
        own[group_of[name]] += bytes_on_a_chip(value)
    for path, leaf in jax.tree_util.tree_flatten_with_path((state.opt_state, state.aux_state))[0]:
        name = next((key.key for key in reversed(path) if getattr(key, "key", None) in spec.groups.trainable), None)
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
    """Sums collectives by kind and axes, most bytes first."""
    # Sums over all collectives of a kind along the same axes, times the runs of their loops.
    found = defaultdict(lambda: [0, 0])
    for one in collectives_of(hlo, mesh):
        entry = found[one.kind, one.axes]
        entry[0] += one.times
        entry[1] += one.times * one.bytes
    traffic = [Traffic(kind=k, axes=a, count=count, bytes=size) for (k, a), (count, size) in found.items()]
    return tuple(sorted(traffic, key=lambda one: -one.bytes))


# Positions of a row a chip has wide intermediates of at a time.
CHUNK = 1024
GIB = 2**30


def suggestions(run: RunConfig, mesh: dict[str, int], memory: Memory, available: int) -> list[str]:
    """Makes sentences with the `--set` that does it, for a step that needs more than `available` bytes."""
    found = [*_compute(run, mesh), *_rows(run, mesh), *_arguments(run, memory, available), *_mesh(run, mesh)]
    # Most promising first.
    missing = (memory.peak - available) / GIB
    return [f"{missing:.1f} GiB too much a chip", *found, "more chips: a larger --topology"]


def _compute(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    """Suggests settings that trade time for memory and leave the numbers as they are."""
    compute, budgets, found = run.compute, run.data.budgets, []
    if compute.remat != "full":
        found.append(f"recompute whole layers: --set compute.remat=full (now {compute.remat})")
    # Logits are made of text targets alone, where there is a budget of them.
    whole = {"mlp_chunk": budgets.tokens, "loss_chunk": budgets.text_targets or budgets.tokens}
    for name, positions in whole.items():
        value, part = getattr(compute, name), positions // mesh["context"]
        if min(value or part, part) > CHUNK:
            found.append(f"smaller pieces of a row: --set compute.{name}={CHUNK} (now {value or 'the whole row'})")
    return found


def _rows(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    groups = mesh["data"] * mesh["fsdp"]
    # Fewer rows at a time keep fewer activations.
    at_once = run.data.rows // run.train.accumulate // groups
    if at_once < 2:
        return []
    return [
        f"one row at a time: --set train.accumulate={run.data.rows // groups} (now {at_once} rows a chip at a time; "
        "accumulated gradients are fp32, split like the parameters)"
    ]


def _arguments(run: RunConfig, memory: Memory, available: int) -> list[str]:
    found = []
    # Frozen parameters need no fp32 master.
    frozen = any(group.learning_rate is None for group in run.optimizer.groups)
    if frozen and run.train.frozen_dtype != "bfloat16":
        found.append(
            f"frozen parameters in half the bytes: --set train.frozen_dtype=bfloat16 (now {run.train.frozen_dtype})"
        )
    if memory.args > available / 2:
        found.append("parameters and optimizer take most: freeze a group, or use more chips along fsdp or context")
    return found


def _mesh(run: RunConfig, mesh: dict[str, int]) -> list[str]:
    """Suggests rows over more chips, at the same number of chips; smaller budgets."""
    found, budgets = [], run.data.budgets
    # Half the rows at a time, over twice the context shards: the same chips, shorter parts of a row.
    if mesh["fsdp"] % 2 == 0 and budgets.tokens % (2 * mesh["context"] * run.data.context_block) == 0:
        half, twice = mesh["fsdp"] // 2, mesh["context"] * 2
        accumulate = run.data.rows // (mesh["data"] * half)
        found.append(
            f"shorter parts of a row a chip: --set mesh.fsdp={half} --set mesh.context={twice} "
            f"--set train.accumulate={accumulate} (data.media_shards a multiple of {twice * mesh['tensor']})"
        )
    if "vision" in run.branches and budgets.patches > budgets.tokens:
        found.append(f"fewer patches a row: --set data.budgets.patches={budgets.patches // 2}")
    return found
