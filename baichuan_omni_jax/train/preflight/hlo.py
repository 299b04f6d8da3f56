"""What the text of a compiled program says: its collectives, and its largest temporaries.

`compiled.as_text()` gives optimized HLO (of CPU, GPU, TPU). Where that fails (jax 0.10 cannot print some asynchronous
TPU programs), compile with `compiler_options={"xla_dump_to": FOLDER, "xla_dump_hlo_as_text": True}` and read
`*after_optimizations.txt` there; the buffer assignment lies beside it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
OP_NAME = re.compile(r'op_name="([^"]*)"')
PRODUCT = re.compile(r" (?:convolution|dot)\(([^)]*)\)")
KERNEL = re.compile(r"%?([a-z_]+)[\w.]* = .* custom-call\(.*custom_call_target=\"tpu_custom_call\"")
_DONE = re.compile(r" [\w\-]+-done\((%[\w.\-]+)\)")
_OPERATION = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]*)\))? ?\{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    `bytes` is the whole array that moves, a device and call: what an all-gather gives, what a reduce-scatter takes.
    `axes` are the mesh axes along which devices exchange it, `scope` the operation's name in the program
    (`jit(step)/jvp(llm)/while/body/attention/...`), `loops` how many loops it lies in and `times` how often a step runs
    it: the product of the loops' lengths, where a loop whose length is not known counts once. `hidden`: it is
    asynchronous, and a matrix product or a kernel stands between its start and its end in the program's order.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    scope: str
    loops: int
    times: int
    hidden: bool = False


def collectives_of(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Lists every collective of optimized HLO, compiled for a mesh of `mesh_shape` (axis -> size, in mesh order).

    Operations among one device (groups of one) are left out. Raises ValueError when the text names devices that the
    mesh does not have.
    """
    # Where each computation is called from, so that a collective in a loop counts as often as the loop runs.
    computations = dict(computations_of(text))
    placed, covered = places_of(computations), _covered(computations)
    found = []
    for name, lines in computations.items():
        if name not in placed:
            continue
        for line in lines:
            hidden = name in covered or instruction_name(line) in covered
            if (one := _collective(line, mesh_shape, *placed[name], hidden)) is not None:
                found.append(one)
    return found


def instruction_name(line: str) -> str:
    """Returns the name of an instruction, as its users write it."""
    return line.strip().removeprefix("ROOT ").partition(" = ")[0]


def _covered(computations: Mapping[str, list[str]]) -> set[str]:
    """Names asynchronous starts, and the computations that they run, with work between them and their end."""
    heavy = {name for name, lines in computations.items() if any(_is_work(line) for line in lines)}
    # A fusion or loop is work where what it calls is.
    while grown := {
        name
        for name, lines in computations.items()
        if name not in heavy and any(called in heavy for line in lines for _, called in _CALLED.findall(line))
    }:
        heavy |= grown
    found = set()
    for lines in computations.values():
        started: dict[str, tuple[int, str]] = {}
        worked = 0  # lines of work so far
        for line in lines:
            if match := _DONE.search(line):
                before, start = started.pop(match[1], (worked, ""))
                if worked > before:
                    found |= {match[1], *(called for _, called in _CALLED.findall(start))}
            elif re.search(r" [\w\-]+-start\(", line):
                started[instruction_name(line)] = worked, line
            elif _is_work(line) or any(called in heavy for _, called in _CALLED.findall(line)):
                worked += 1
    return found


def _is_work(line: str) -> bool:
    return bool(PRODUCT.search(line)) or "tpu_custom_call" in line


def _collective(line: str, mesh_shape: Mapping[str, int], loops: int, times: int, hidden: bool) -> Collective | None:
    match = _OPERATION.search(line)
    # A line that only names the operation (as a metadata entry does) has no result before it.
    if match is None or " = " not in line[: match.start()]:
        return None
    kind, started = match[1], match[2] is not None
    groups = _groups(line, math.prod(mesh_shape.values()))
    # Groups of one device exchange nothing.
    axes = _axes(groups, mesh_shape)
    if not axes:
        return None
    # The operation's results; asynchronous halves carry their operands and a state beside them.
    sizes = [array_bytes(*shape) for shape in _SHAPE.findall(line[line.index(" = ") : match.start()])]
    if started and kind == "all-gather":  # (operands, results)
        sizes = sizes[len(sizes) // 2 :]
    elif started and kind != "all-reduce":  # (operand, result, state)
        sizes = sizes[:1]
    size = sum(sizes) * (len(groups[0]) if kind == "reduce-scatter" else 1)
    scope = OP_NAME.search(line)
    return Collective(kind, size, axes, scope[1] if scope else "", loops, times, hidden)


def computations_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, lines) of every computation; the entry is called ENTRY."""
    name, lines = None, []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = "ENTRY" if header[1] else header[2], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def places_of(computations: Mapping[str, list[str]]) -> dict[str, tuple[int, int]]:
    """Counts (loops around it, calls a step) of every computation that the entry reaches."""
    # The call graph, turned round: who calls a computation, in a loop or not, and how often.
    callers = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            # The later halves of an asynchronous operation name its computation again.
            if re.search(r" async-(update|done)\(", line):
                continue
            for how, called in _CALLED.findall(line):
                callers[called].append((name, how == "body", _trips(line, computations) if how == "body" else 1))
            for branches in _BRANCHES.findall(line):
                for called in branches.split(","):
                    callers[called.strip().lstrip("%")].append((name, False, 1))
    # From there to the entry, which is called once.
    placed: dict[str, tuple[int, int] | None] = {"ENTRY": (0, 1)}

    def place(name: str) -> tuple[int, int] | None:
        if name not in placed:
            reached = [
                (at[0] + is_loop, at[1] * trips)
                for caller, is_loop, trips in callers[name]
                if (at := place(caller)) is not None
            ]
            placed[name] = (max(loops for loops, _ in reached), sum(times for _, times in reached)) if reached else None
        return placed[name]

    return {name: at for name in computations if (at := place(name)) is not None}


def _trips(line: str, computations: Mapping[str, list[str]]) -> int:
    """Counts the runs of the loop called in `line`: as XLA notes, else the bound its counter is compared with, else 1.

    Programs for TPU carry no note. The counter of `jax.lax.scan` starts at 0; a bound that is no constant is not known.
    """
    if noted := _TRIPS.search(line):
        return int(noted[1])
    # No note: the one integer constant of the condition is the bound.
    condition = _CONDITION.search(line)
    text = "\n".join(computations.get(condition[1], ())) if condition else ""
    bounds = re.findall(r" = s32\[\]\S* constant\((\d+)\)", text)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else 1


def _groups(line: str, devices: int) -> list[tuple[int, ...]]:
    """Lists the devices, by place in the mesh, that exchange with one another; of a permute, each (source, target)."""
    # Three ways to write groups, and none, which is all devices.
    if match := _MESH_GROUPS.search(line):
        return _mesh_groups(match)
    if match := _IOTA_GROUPS.search(line):
        shape, dims = numbers_in(match[1]), numbers_in(match[2])
        order = numbers_in(match[3]) if match[3] else range(len(dims))
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        return [tuple(group) for group in numbers.tolist()]
    if match := _LISTED_GROUPS.search(line):
        groups = [numbers_in(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        return groups or [tuple(range(devices))]
    return [tuple(range(devices))]


def _mesh_groups(match: re.Match) -> list[tuple[int, ...]]:
    """Reads groups written as mesh axes: mesh['a'=2,'b'=4] {'a', 'b':(2)2}, where b's part runs from 2 to 2 x 2."""
    # The mesh's own axes and devices, and which part of each axis a group spans.
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    devices = np.array(numbers_in(match[2])) if match[2] else np.arange(math.prod(sizes.values()))
    parts = {axis: (int(before or 1), int(size or sizes[axis])) for axis, before, size in _PART.findall(match[3])}
    shape, exchanged = [], []
    # Each axis is cut in three: before the part, the part that exchanges, and after it.
    for axis, size in sizes.items():
        before, own = parts.get(axis, (size, 1))
        exchanged += [len(shape) + 1]
        shape += [before, own, size // (before * own)]
    # Then the exchanged parts go last, and each line is a group.
    kept = [dim for dim in range(len(shape)) if dim not in exchanged]
    moved = devices.reshape(shape).transpose(kept + exchanged)
    return [tuple(group) for group in moved.reshape(-1, math.prod(shape[dim] for dim in exchanged)).tolist()]


_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def _axes(groups: list[tuple[int, ...]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Finds the mesh axes along which members of a group differ."""
    if max(max(group) for group in groups) >= math.prod(mesh_shape.values()):
        raise ValueError(f"the program runs on more devices than the mesh {dict(mesh_shape)} has")
    sizes = tuple(mesh_shape.values())
    # Coordinates of every member; an axis along which any two of a group differ is exchanged over.
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), sizes))
        differs |= (places != places[:, :1]).any(1)
    return tuple(axis for axis, moves in zip(mesh_shape, differs, strict=True) if moves)


def array_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return -(-math.prod(numbers_in(dims)) * bits // 8)


def numbers_in(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)[^>]*> \(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])")


@dataclass(frozen=True)
class Temporary:
    """A place in the space of temporaries and its largest user: array, and the operation's name in the program."""

    bytes: int
    array: str
    scope: str


def largest_temporaries(assignment: str, hlo: str, count: int = 12) -> list[Temporary]:
    """Lists the largest arrays of the temporaries' space that share no byte with each other, largest first.

    `assignment` is XLA's `*buffer-assignment.txt`; arrays at one place live at different times, the largest is named.
    Empty where the text is of another form.
    """
    # Users of each place; arrays at one place live at different times.
    found, taken, places = [], [], defaultdict(list)
    for size, start, array, name in _values(assignment):
        places[size, start].append((array, name))
    for size, start in sorted(places, reverse=True):
        # Largest first, and only where no larger one lies.
        if all(start + size <= low or start >= high for low, high in taken):
            taken.append((start, start + size))
            users = places[size, start]
            # Buffers that a loop fills are allocated by operations without a name: another user has one.
            scopes = [scope for _, name in users if (scope := _scope(hlo, name))]
            found.append(Temporary(size, users[0][0], scopes[0] if scopes else ""))
            if len(found) == count:
                break
    return found


def _values(assignment: str) -> list[tuple[int, int, str, str]]:
    """Lists (bytes, offset, array, instruction) of what lies in the temporaries' space of the main memory."""
    values, inside = [], False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            inside = "preallocated-temp" in line and ", color" not in line
        elif inside and (match := _VALUE.match(line)):
            values.append((int(match[2]), int(match[3]), match[4], match[1]))
    return values


def _scope(hlo: str, instruction: str) -> str:
    line = re.search(rf"^\s*(?:ROOT )?%?{re.escape(instruction)} = .*$", hlo, re.MULTILINE)
    name = re.search(r'op_name="([^"]*)"', line[0]) if line else None
    return name[1] if name else ""
