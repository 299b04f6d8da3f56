"""What a conversion will do, decided and checked before anything is written.

A plan is made from names, shapes and dtypes alone, in either direction. Whatever does not fit is collected, so that
one ConfigError names every offender at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from baichuan_omni_jax.convert.rules import Entry, Rule, expand
from baichuan_omni_jax.convert.safetensors_io import TensorInfo
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_values

_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})
Tables = Mapping[str, Iterable[Rule]]


@dataclass
class Plan:
    """`entries` by branch; `tensors` (theirs) and `leaves` (ours, by branch) with their dtypes; `buffers` by name.

    `dropped` names tensors of the source that nothing reads, and that are not written back (`buffers.rotary_buffers`).
    """

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    leaves: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    buffers: dict[str, Rule] = field(default_factory=dict)
    dropped: dict[str, bool] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are moved."""
        return sum(self.tensors[entry.name].nbytes for entries in self.entries.values() for entry in entries)


def plan_from_tensors(
    found: Mapping[str, TensorInfo],
    tables: Tables,
    abstract: Mapping[str, Any],
    where: str,
    *,
    only: Iterable[str] = (),
) -> Plan:
    """The plan that reads the tensors `found` at `where` into the branches of `abstract`, by `tables`.

    `only` names the branches wanted (default: all of `tables`); tensors of the others are left alone. Raises
    ConfigError naming every tensor without a rule or with two, missing or superfluous, of a wrong shape or dtype.
    """
    wanted = tuple(only) or tuple(tables)
    plan, problems = _expand_all({name: tables[name] for name in wanted}, _shapes(abstract, wanted))
    expected = {entry.name: entry for entries in plan.entries.values() for entry in entries}
    for name, info in found.items():
        rules = [(branch, rule) for branch, rows in tables.items() for rule in rows if rule.pattern.fullmatch(name)]
        if len(rules) != 1:
            two = " and ".join(rule.theirs for _, rule in rules)
            problems.append(f"tensor {name} has " + (f"two rules, {two}" if rules else "no rule"))
            continue
        branch, rule = rules[0]
        if branch in wanted:
            plan.tensors[name] = info
            if rule.restore:
                plan.buffers[name] = rule
            elif name not in expected:
                problems.append(f"tensor {name} has no place in a model of this config")
            else:
                problems += _misfits(name, info, expected[name].shape)
    problems += [f"tensor {name} {_list(e.shape)} is missing" for name, e in expected.items() if name not in found]
    if not problems:
        problems += _join_dtypes(plan, abstract)
    raise_problems(problems, where)
    return plan


def plan_from_leaves(
    stored: Mapping[str, Mapping[str, TensorInfo]], tables: Tables, abstract: Mapping[str, Any], where: str
) -> Plan:
    """The plan that writes the parameters `stored` (by branch) as checkpoint tensors, and its buffers.

    A tensor whose parts differ in dtype (some trained in fp32, others frozen as bf16) becomes fp32: it holds them all.
    Raises ConfigError naming every parameter that the model lacks or has alone, or has in another shape.
    """
    plan, problems = _expand_all({name: tables[name] for name in stored}, _shapes(abstract, stored))
    for branch, leaves in stored.items():
        wanted = _shapes(abstract, [branch])[branch]
        for name in sorted(wanted.keys() - leaves.keys()):
            problems.append(f"parameter {branch}.{name} {_list(wanted[name])} is missing")
        for name, info in leaves.items():
            if name not in wanted:
                problems.append(f"parameter {branch}.{name} has no place in a model of this config")
            else:
                problems += _misfits(f"{branch}.{name}", info, wanted[name])
        plan.leaves[branch] = dict(leaves)
        plan.buffers |= {rule.theirs: rule for rule in tables[branch] if rule.restore}
    raise_problems(problems, where)
    for branch, entries in plan.entries.items():
        for entry in entries:
            dtypes = {stored[branch][leaf].dtype for leaf in entry.leaves}
            common = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            plan.tensors[entry.name] = TensorInfo(entry.shape, common)
    return plan


def raise_problems(problems: list[str], where: str) -> None:
    """Raises ConfigError naming all `problems` of `where`, if there are any."""
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"{where} cannot be converted, {count}: {'; '.join(problems)}")


def _expand_all(tables: Tables, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> tuple[Plan, list[str]]:
    plan, problems, owners = Plan(), [], {}
    for branch, rules in tables.items():
        plan.entries[branch], wrong = expand(rules, shapes[branch], branch)
        problems += wrong
        for entry in plan.entries[branch]:
            if owners.setdefault(entry.name, branch) != branch:
                problems.append(f"tensor {entry.name} has two rules, of {owners[entry.name]} and of {branch}")
    return plan, problems


def _join_dtypes(plan: Plan, abstract: Mapping[str, Any]) -> list[str]:
    """Fills `plan.leaves`: a parameter has one dtype, that of all the tensors it is made of."""
    problems = []
    for branch, entries in plan.entries.items():
        dtypes: dict[str, set[np.dtype]] = {}
        for entry in entries:
            for leaf in entry.leaves:
                dtypes.setdefault(leaf, set()).add(plan.tensors[entry.name].dtype)
        problems += [
            f"{branch}.{leaf} would join dtypes {_kinds(kinds)}" for leaf, kinds in dtypes.items() if len(kinds) > 1
        ]
        shapes = _shapes(abstract, [branch])[branch]
        plan.leaves[branch] = {leaf: TensorInfo(shapes[leaf], min(kinds, key=str)) for leaf, kinds in dtypes.items()}
    return problems


def _misfits(name: str, info: TensorInfo, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if tuple(info.shape) != tuple(shape):
        problems.append(f"tensor {name} has shape {_list(info.shape)}, the config wants {_list(shape)}")
    if info.dtype.name not in _FLOATS:
        problems.append(f"tensor {name} has dtype {info.dtype.name}, not a floating one")
    return problems


def _shapes(abstract: Mapping[str, Any], branches: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {
        branch: {name: tuple(leaf.shape) for name, leaf in named_values(abstract[branch]).items()}
        for branch in branches
    }


def _list(shape: tuple[int, ...]) -> str:
    return str(list(shape))


def _kinds(dtypes: Iterable[np.dtype]) -> str:
    return " and ".join(sorted(dtype.name for dtype in dtypes))
