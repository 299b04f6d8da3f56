"""Conversion tables: one row a weight, read in both directions.

A row pairs the name of a checkpoint tensor with the dotted name of a parameter:

    Rule("model.layers.{layer}.mlp.up_proj.weight", "layers.mlp.up_proj.weight", "f d -> d f")

`{word}` stands for a number. One that both names have counts a list (`heads.{q}`); one that only the checkpoint's name
has is stacked: the parameter has an axis for it, in front, in order of appearance. The transform is einops', from the
checkpoint's axes to those of one layer of the parameter; sizes are only needed where our side joins axes. A row with
several parameters cuts the tensor along its first axis (a packed Q, K, V). A row with `restore` is a buffer that the
released code computes: it is dropped on the way here and computed again on the way back.

What the tensors must be called and look like follows from the parameters' shapes alone (`expand`).
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import einops
import numpy as np

_FIELD = re.compile(r"\{(\w+)\}")
_AXES = re.compile(r"\([^)]*\)|\w+")


@dataclass(frozen=True)
class Rule:
    """A row. `ours` is one parameter or several, cut from the tensor's first axis in that order; none with `restore`.

    `sizes` gives axes of `transform` that our side joins, as pairs; `restore` makes the exact fp32 buffer.
    """

    theirs: str
    ours: str | tuple[str, ...] = ()
    transform: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    restore: Callable[[], np.ndarray] | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole of a checkpoint tensor's name."""
        return _pattern(self.theirs)

    @property
    def stack(self) -> tuple[str, ...]:
        """Fields that are leading axes of the parameter."""
        ours = _FIELD.findall(self.targets[0]) if self.targets else ()
        return tuple(field for field in _FIELD.findall(self.theirs) if field not in ours)

    @property
    def keeps_rows(self) -> bool:
        """Whether the first axis stays the first, so that blocks of rows can be moved one by one."""
        if len(self.targets) != 1 or not self.transform:
            return len(self.targets) == 1
        left, right = (_AXES.findall(side) for side in self.transform.split("->"))
        return left[0] == right[0] and left[0][0] != "("

    def forward(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A checkpoint tensor (or the rows of one part) as one layer of the parameter, of `shape`."""
        if not self.transform:
            return tensor
        right = _AXES.findall(self.transform.split("->")[1])
        plain = {axis: size for axis, size in zip(right, shape, strict=True) if axis[0] != "("}
        return einops.rearrange(tensor, self.transform, **plain, **dict(self.sizes))

    def backward(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `forward`."""
        if not self.transform:
            return value
        left, right = self.transform.split("->")
        return einops.rearrange(value, f"{right.strip()} -> {left.strip()}", **dict(self.sizes))

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape of one layer's `shape`. Raises einops.EinopsError when the transform cannot be it."""
        return self.backward(np.broadcast_to(np.empty((), np.int8), shape)).shape

    def parts(self, shapes: Iterable[tuple[int, ...]]) -> list[slice]:
        """Rows of the checkpoint tensor that each parameter (by its one layer's shape) takes."""
        ends = np.cumsum([0, *(self.tensor_shape(shape)[0] for shape in shapes)]).tolist()
        return [slice(start, end) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Entry:
    """One checkpoint tensor and where it goes: layer `index` of each parameter of `leaves`."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    leaves: tuple[str, ...]
    index: tuple[int, ...]
    parts: tuple[slice, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def expand(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]], branch: str) -> tuple[list[Entry], list[str]]:
    """Every checkpoint tensor of a branch whose parameters have `shapes`, in the table's order, and what is wrong.

    A row without a parameter, a parameter without a row or with two, and a tensor named twice are offences.
    """
    entries, problems = [], []
    rows: dict[str, list[Rule]] = {name: [] for name in shapes}
    for rule in rules:
        if rule.restore:
            continue
        found, wrong = _expand_rule(rule, shapes, branch)
        entries += found
        problems += wrong
        for leaf in {leaf for entry in found for leaf in entry.leaves}:
            rows[leaf].append(rule)
    for leaf, wanted in rows.items():
        if not wanted:
            problems.append(f"parameter {branch}.{leaf} is never written: no rule names it")
        elif len(wanted) > 1:
            problems.append(f"parameter {branch}.{leaf} is written twice: by {_names(wanted)}")
    names = [entry.name for entry in entries]
    problems += [
        f"two rules of {branch} name tensor {name}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    return entries, problems


def _expand_rule(rule: Rule, shapes: Mapping[str, tuple[int, ...]], branch: str) -> tuple[list[Entry], list[str]]:
    entries, problems = [], []
    first = _pattern(rule.targets[0])
    matches = [match for match in map(first.fullmatch, shapes) if match]
    if not matches:
        return [], [f"rule {rule.theirs} names no parameter of {branch} ({rule.targets[0]})"]
    for match in matches:
        leaves = tuple(target.format(**match.groupdict()) for target in rule.targets)
        absent = [leaf for leaf in leaves if leaf not in shapes]
        if absent:
            problems.append(f"rule {rule.theirs} names {branch}.{', '.join(absent)}, which the model does not have")
            continue
        try:
            entries += _expand_leaves(rule, leaves, [shapes[leaf] for leaf in leaves], match.groupdict())
        except (einops.EinopsError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            problems.append(f"rule {rule.theirs} does not fit {branch}.{leaves[0]} {shapes[leaves[0]]}: {cause}")
    return entries, problems


def _expand_leaves(
    rule: Rule, leaves: tuple[str, ...], shapes: list[tuple[int, ...]], fields: dict[str, str]
) -> list[Entry]:
    depth = len(rule.stack)
    counts = shapes[0][:depth]
    if any(shape[:depth] != counts for shape in shapes):
        raise ValueError(f"stacked axes differ: {shapes}")
    inner = [shape[depth:] for shape in shapes]
    parts = tuple(rule.parts(inner)) if len(leaves) > 1 else ()
    whole = rule.tensor_shape(inner[0])
    if parts:
        whole = (parts[-1].stop, *whole[1:])
    return [
        Entry(
            rule.theirs.format(**fields, **dict(zip(rule.stack, index, strict=True))), whole, rule, leaves, index, parts
        )
        for index in np.ndindex(*counts)
    ]


def _pattern(template: str) -> re.Pattern[str]:
    """`a.{n}.b` as an expression with a group `n` of digits; a number is written without leading zeros."""
    pieces = _FIELD.split(template)
    return re.compile(
        "".join(rf"(?P<{piece}>0|[1-9]\d*)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    )


def _names(rules: Iterable[Rule]) -> str:
    return " and ".join(rule.theirs for rule in rules)
