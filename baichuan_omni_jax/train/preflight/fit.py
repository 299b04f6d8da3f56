"""`compute.remat=fit`: the values that a layer keeps for its backward pass, as many as the device's memory holds.

Found by compiling, not by running. The step that recomputes everything is compiled first; what each further value adds
is counted in the traced program, as the arrays that its layer scans hand from the forward to the backward pass. Values
are taken in the order in which they pay (`nn/remat.py`), each where the sum still fits, and what was chosen is
compiled: the compiler has the last word.

    full                  9.6 GiB     compiled
    + attention_out      12.7         counted: fits
    + mlp_gate_up        45.1         counted: fits, and compiled 44.8
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.nn.remat import VALUE_NAMES
from baichuan_omni_jax.sharding import axis_product
from baichuan_omni_jax.train.preflight.compile import CompiledProgram, abstract_step, compile_for_devices
from baichuan_omni_jax.train.step import compute_gradients

# Of the memory that a program may use: left for the runtime, and for batches on their way to the device.
MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class RematFit:
    """What `fit` chose and why; bytes are one device's.

    `compiled` holds the peak of each policy that was compiled, in that order; `too_large` the peak that was predicted
    with each value that was left out.
    """

    remat: str
    hbm_bytes: int
    compiled: dict[str, int] = field(default_factory=dict)
    too_large: dict[str, int] = field(default_factory=dict)


def fit_remat(
    run: RunConfig,
    omni: OmniConfig,
    devices: list[Any],
    available: int,
    build: Callable[..., CompiledProgram] = compile_for_devices,
) -> tuple[RematFit, CompiledProgram]:
    """Finds the values that fit beside everything else, `MARGIN` of the memory left free.

    Args:
        run: its `compute.remat` is not read.
        omni: the model's sizes.
        devices: of the mesh; they need not be there (`devices_of`).
        available: bytes of one device that a program may use.
        build: compiles (spec, state, batch), as `compile_for_devices`.

    Returns:
        The choice, and the program compiled with it. Where nothing fits that is `full`, which may not fit either.
    """
    program = build(*abstract_step(with_remat(run, "full"), omni, devices))
    compiled, too_large = {"full": program.memory.peak}, {}
    room = int((1 - MARGIN) * (program.memory.available or available))

    # Predicted: each value in turn beside those taken before it. One that adds nothing is not in this run's model.
    before = least = kept_bytes(with_remat(run, "full"), omni, devices)
    taken: list[str] = []
    for name in VALUE_NAMES if program.memory.available is None else ():
        held = kept_bytes(with_remat(run, "+".join([*taken, name])), omni, devices)
        predicted = program.memory.peak + held - least
        if predicted > room:
            too_large[name] = predicted
        elif held > before:
            taken, before = [*taken, name], held

    # Compiled: where the prediction was too low, the last and widest value goes first.
    while taken:
        policy = "+".join(taken)
        tried = build(*abstract_step(with_remat(run, policy), omni, devices))
        compiled[policy] = tried.memory.peak
        if tried.memory.available is None and tried.memory.peak <= room:
            return RematFit(remat=policy, hbm_bytes=available, compiled=compiled, too_large=too_large), tried
        too_large[taken.pop()] = tried.memory.peak
    return RematFit(remat="full", hbm_bytes=available, compiled=compiled, too_large=too_large), program


def with_remat(run: RunConfig, policy: str) -> RunConfig:
    """Returns the run with another `compute.remat`."""
    return replace(run, compute=replace(run.compute, remat=policy))


def kept_bytes(run: RunConfig, omni: OmniConfig, devices: list[Any]) -> int:
    """Counts the bytes that the layer scans of a traced step stack up, on one device's memory.

    Gradients of stacked parameters are among them: only the difference of two policies means something.
    """
    spec, state, batch = abstract_step(run, omni, devices)
    with jax.set_mesh(spec.mesh):
        traced = jax.jit(lambda state, batch: compute_gradients(state, batch, spec)).trace(state, batch)
    return _stacked(traced.jaxpr.jaxpr)


def _stacked(jaxpr: Jaxpr) -> int:
    """Sums what scans give per turn; of one that gives nothing (parts of a step), what lies in it."""
    total = 0
    for equation in jaxpr.eqns:
        own = 0
        if equation.primitive.name == "scan":
            own = sum(_local_bytes(result.aval) for result in equation.outvars[equation.params["num_carry"] :])
        # What a loop inside stacks up is handed on by the loop around it: counted once, there.
        inner = (_stacked(part) for part in _jaxprs_of(equation)) if not own else ()
        total += own + sum(inner)
    return total


def _jaxprs_of(equation: Any) -> list[Jaxpr]:
    """Lists the programs that an operation calls: bodies of loops, branches, calls."""
    is_program = lambda x: isinstance(x, ClosedJaxpr | Jaxpr)  # noqa: E731
    found = filter(is_program, jax.tree.leaves(list(equation.params.values()), is_leaf=is_program))
    return [part.jaxpr if isinstance(part, ClosedJaxpr) else part for part in found]


def _local_bytes(aval: Any) -> int:
    """The bytes of one device's part of an array; 0 of one in the host's memory."""
    if aval.memory_space == jax.memory.Space.Host:
        return 0
    # Inside a `shard_map` arrays are a device's own, and their spec names no axis.
    split = [axis for axes in aval.sharding.spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)]
    return aval.size * aval.dtype.itemsize // axis_product(aval.sharding.mesh, split)
