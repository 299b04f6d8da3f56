"""The work that the text of a compiled program (`hlo`) tells of: matrix products, kernels and copies."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from baichuan_omni_jax.train.preflight.hlo import (
    KERNEL,
    OP_NAME,
    PRODUCT,
    array_bytes,
    computations_of,
    instruction_name,
    numbers_in,
    places_of,
)

_COPY = re.compile(r" = ([a-z]+\d+\w*|pred)\[([\d,]*)\]\S* copy\(")
_RESULT = re.compile(r" = (?:pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BATCH_DIMS = re.compile(r"lhs_batch_dims=\{([\d,]*)\}")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


@dataclass(frozen=True)
class Product:
    """One matrix product, or kernel (`kernel` is its name, `flops` 0: the program does not tell), as `Collective`."""

    flops: int
    scope: str
    times: int
    kernel: str = ""


def products_of(text: str) -> list[Product]:
    """Lists every matrix product and kernel of optimized HLO.

    libtpu writes products as convolutions of many forms; what each computes is read off the sizes of its three arrays:
    (b m k) (b k n) (b m n) = (b m k n)^2 b, where batch dims b are dilated. True convolutions count too little.
    """
    computations = dict(computations_of(text))
    placed, shapes = places_of(computations), _shapes(computations)
    found = []
    for name, lines in computations.items():
        for line in lines if name in placed else ():
            scope = OP_NAME.search(line)
            if match := PRODUCT.search(line):
                operands = [shapes.get(operand, (0,)) for operand in match[1].split(", ")[:2]]
                numbers = math.prod(math.prod(shape) for shape in (*operands, shapes[instruction_name(line)]))
                flops = 2 * math.isqrt(numbers // _batch(line, operands[0]))
                found.append(Product(flops, scope[1] if scope else "", placed[name][1]))
            elif "tpu_custom_call" in line and (match := KERNEL.search(line)):
                found.append(Product(0, scope[1] if scope else "", placed[name][1], match[1]))
    return found


def copied_bytes(text: str) -> int:
    """Sums what a step copies from one place or layout to another, by the bytes that are written."""
    computations = dict(computations_of(text))
    placed, total = places_of(computations), 0
    for name, lines in computations.items():
        for line in lines if name in placed else ():
            if match := _COPY.search(line):
                total += placed[name][1] * array_bytes(match[1], match[2])
    return total


def _shapes(computations: Mapping[str, list[str]]) -> dict[str, tuple[int, ...]]:
    """Finds the shape of every instruction's result, by name."""
    found = {}
    for lines in computations.values():
        for line in lines:
            if shape := _RESULT.search(line):
                found[instruction_name(line)] = numbers_in(shape[1])
    return found


def _batch(line: str, first: tuple[int, ...]) -> int:
    """Counts the products that one instruction makes side by side; `first` is the shape of its first operand."""
    # Of a dot they are named; of a convolution stride and dilation keep them apart.
    if match := _BATCH_DIMS.search(line):
        return math.prod(first[dim] for dim in numbers_in(match[1]))
    window = _WINDOW.search(line)
    parts = dict(item.split("=") for item in window[1].split()) if window else {}
    if "lhs_dilate" not in parts:
        return 1
    sizes, strides, dilations = (map(int, parts[name].split("x")) for name in ("size", "stride", "lhs_dilate"))
    apart = zip(sizes, strides, dilations, strict=True)
    return math.prod(size for size, stride, dilation in apart if size == dilation == stride + 1 and size > 1)
