"""How many bytes a compiled TPU program only moves: copies and transposes in its optimized HLO text."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}
# What a fusion that computes nothing may hold, besides at least one copy or transpose.
_MOVES = {"copy", "transpose"}
_HARMLESS = {"parameter", "bitcast", "reshape", "constant", "tuple", "get-tuple-element", "slice", "pad", "concatenate"}
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class Instruction(NamedTuple):
    name: str
    opcode: str
    result: str
    line: str


def moved_bytes(hlo: str) -> int:
    """Bytes written by copies, transposes and fusions of nothing else, tile padding included.

    A copy between HBM and on-chip memory that keeps its layout (a prefetch) is not counted.
    """
    computations = _computations(hlo)
    fused = {name for body in computations.values() for i in body if i.opcode == "fusion" for name in _calls(i)}
    total = 0
    for name, body in computations.items():
        if name not in fused:
            total += sum(_size(i.result) for i in body if _only_moves(i, computations))
    return total


def _only_moves(instruction: Instruction, computations: dict[str, list[Instruction]]) -> bool:
    if instruction.opcode in _MOVES:
        return True
    if instruction.opcode == "copy-start":
        target, source = list(_ARRAY.finditer(instruction.result))[:2]
        return _layout(target) != _layout(source)
    if instruction.opcode == "fusion":
        opcodes = {i.opcode for name in _calls(instruction) for i in computations[name]}
        return bool(opcodes & _MOVES) and opcodes <= _MOVES | _HARMLESS
    return False


def _computations(hlo: str) -> dict[str, list[Instruction]]:
    found, body = {}, []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            body = found[header[1]] = []
        elif instruction := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\(", line):
            body.append(Instruction(instruction[1], instruction[3], instruction[2], line))
    return found


def _calls(instruction: Instruction) -> list[str]:
    return re.findall(r"calls=%([\w.-]+)", instruction.line)


def _layout(array: re.Match) -> tuple[str, str]:
    """Order of dims and tiles, without the memory space."""
    return array[3] or "", re.sub(r"S\(\d+\)", "", array[4] or "")


def _size(result: str) -> int:
    """Bytes of the first array of a result, its two minor dims rounded up to the tile."""
    array = _ARRAY.search(result)
    dims = [int(d) for d in array[2].split(",") if d]
    order = [int(d) for d in (array[3] or "").split(",") if d]
    tile = re.search(r"T\(([\d,]+)\)", array[4] or "")
    if tile:
        for dim, step in zip(order, reversed([int(t) for t in tile[1].split(",")]), strict=False):
            dims[dim] = -(-dims[dim] // step) * step
    return math.prod(dims) * _BYTES[array[1]]
