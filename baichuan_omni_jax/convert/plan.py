"""What a conversion will do, decided and checked before anything is written, and the plan in words.

A plan is made from names, shapes and dtypes alone, in either direction. Whatever does not fit is collected, so that
one ConfigError counts the offenders and names the first of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.convert.rules import Entry, Rule, expand
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, TensorSource
from baichuan_omni_jax.convert.tables import VISION_TOWER
from baichuan_omni_jax.errors import ConfigError, list_some
from baichuan_omni_jax.nn.param import named_values

_FLOATS = frozenset({"bfloat16", "float16", "float32", "float64"})
# Older versions of transformers saved what rotary positions are computed from, once or in every layer.
_ROTARY = re.compile(r"(?:.*\.)?rotary(?:_pos)?_emb\.(inv_freq|cos_cached|sin_cached)")
_VISION_BASE = 1e4
# How close saved frequencies must be: bf16 keeps 8 bits, fp16 has no small numbers.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-5
Tables = Mapping[str, Iterable[Rule]]
# Called with the bytes that have been moved since the last call.
Advance = Callable[[int], None]


@dataclass
class Plan:
    """What goes location in a conversion, in either direction.

    Attributes:
        entries: branch -> its checkpoint tensors, each with the parameters that it fills.
        tensors: checkpoint tensor -> shape and dtype.
        leaves: branch -> parameter -> shape and dtype.
        buffers: tensors that are computed, not converted, with the rule that computes each.
        dropped: tensors of the source that nothing reads and that are not written back (see `rotary_buffers`).
    """

    entries: dict[str, list[Entry]] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    leaves: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    buffers: dict[str, Rule] = field(default_factory=dict)
    dropped: dict[str, bool] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the tensors that are moved."""
        return sum(self.tensors[entry.name].nbytes for entries in self.entries.values() for entry in entries)


def plan_from_tensors(
    found: Mapping[str, TensorInfo],
    tables: Tables,
    abstract: Mapping[str, Any],
    location: str,
    *,
    only: Iterable[str] = (),
) -> Plan:
    """Plans reading checkpoint tensors into branches.

    Args:
        found: the tensors of the source, with shapes and dtypes.
        tables: branch -> its rules.
        abstract: branch -> the module to fill, with shapes for values.
        location: what the source is called in errors.
        only: the branches wanted (default: all of `tables`); tensors of the others are left alone.

    Raises:
        ConfigError: names the first tensors without a rule or with two, missing or superfluous, or of a wrong shape or
            dtype.
    """
    wanted = tuple(only) or tuple(tables)
    # What the parameters' shapes demand, against what is found: each side may lack what the other has.
    plan, problems = _expand_all({name: tables[name] for name in wanted}, _shapes(abstract, wanted))
    expected = {entry.name: entry for entries in plan.entries.values() for entry in entries}
    for name, info in found.items():
        # Rules of all branches, also those not wanted: a tensor that no rule knows is a weight that would be lost.
        matches = [(branch, rule) for branch, rules in tables.items() for rule in rules if rule.pattern.fullmatch(name)]
        if len(matches) != 1:
            two = " and ".join(rule.tensor for _, rule in matches)
            problems.append(f"tensor {name} has " + (f"two rules, {two}" if matches else "no rule"))
            continue
        branch, rule = matches[0]
        if branch in wanted:
            plan.tensors[name] = info
            if rule.restore:
                plan.buffers[name] = rule
            elif name not in expected:
                problems.append(f"tensor {name} has no place in a model of this config")
            else:
                problems += _misfits(name, info, expected[name].shape)
    problems += [f"tensor {name} {_list(e.shape)} is missing" for name, e in expected.items() if name not in found]
    # Only where all tensors are known do the parameters' dtypes follow from them.
    if not problems:
        problems += _join_dtypes(plan, abstract)
    raise_problems(problems, location)
    return plan


def plan_from_leaves(
    stored: Mapping[str, Mapping[str, TensorInfo]], tables: Tables, abstract: Mapping[str, Any], location: str
) -> Plan:
    """Plans writing parameters as checkpoint tensors, and the buffers that belong to them.

    Args:
        stored: branch -> its parameters as a checkpoint holds them, with shapes and dtypes.
        tables: branch -> its rules.
        abstract: branch -> the module that the parameters must be those of, with shapes for values.
        location: what the checkpoint is called in errors.

    Raises:
        ConfigError: names the first parameters that only one of checkpoint and model has, or that has another shape.
    """
    plan, problems = _expand_all({name: tables[name] for name in stored}, _shapes(abstract, stored))
    # Checkpoint against model, by name and shape: what a table lacks has been found by expanding it.
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
        plan.buffers |= {rule.tensor: rule for rule in tables[branch] if rule.restore}
    raise_problems(problems, location)
    # A tensor whose parts differ in dtype (some trained in fp32, others frozen as bf16) becomes fp32, which holds both.
    for branch, entries in plan.entries.items():
        for entry in entries:
            dtypes = {stored[branch][leaf].dtype for leaf in entry.leaves}
            common = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
            plan.tensors[entry.name] = TensorInfo(entry.shape, common)
    return plan


def raise_problems(problems: list[str], location: str) -> None:
    """Raises ConfigError counting the `problems` of `location` and naming the first, if there are any."""
    if problems:
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise ConfigError(f"{location} cannot be converted, {count}: {list_some(problems)}")


def _expand_all(tables: Tables, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> tuple[Plan, list[str]]:
    plan, problems, owners = Plan(), [], {}
    for branch, rules in tables.items():
        plan.entries[branch], wrong = expand(rules, shapes[branch], branch)
        problems += wrong
        for entry in plan.entries[branch]:
            # Within a branch `expand` finds doubles; here those of two branches.
            if owners.setdefault(entry.name, branch) != branch:
                problems.append(f"tensor {entry.name} has two rules, of {owners[entry.name]} and of {branch}")
    return plan, problems


def _join_dtypes(plan: Plan, abstract: Mapping[str, Any]) -> list[str]:
    """Fills `plan.leaves` and returns problems: a parameter has one dtype, that of all the tensors it is made of."""
    problems = []
    for branch, entries in plan.entries.items():
        dtypes: dict[str, set[np.dtype]] = {}
        for entry in entries:
            for leaf in entry.leaves:
                dtypes.setdefault(leaf, set()).add(plan.tensors[entry.name].dtype)
        for leaf, kinds in dtypes.items():
            if len(kinds) > 1:
                named = " and ".join(sorted(kind.name for kind in kinds))
                problems.append(f"{branch}.{leaf} would join dtypes {named}")
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


def rotary_buffers(source: TensorSource, cfg: OmniConfig) -> dict[str, bool]:
    """Finds the buffers of rotary positions that `source` holds, which nothing here reads, nor does transformers.

    Returns:
        Name -> whether it is what the configuration gives: false for frequencies of another base, or another size.
    """
    buffers = {}
    found = [(name, match[1]) for name in source.infos if (match := _ROTARY.fullmatch(name))]
    for name, kind in found:
        buffers[name] = True
        if kind == "inv_freq":
            # Two dimensions share a vision head, so its frequencies span half as many values.
            vision = cfg.vision.embed_dim // cfg.vision.num_heads // 2, _VISION_BASE
            width, base = vision if name.startswith(f"{VISION_TOWER}.") else (cfg.llm.head_dim, cfg.llm.rope_theta)
            expected = base ** -(np.arange(0, width, 2) / width)
            value = source.read(name).astype(np.float64)
            same_size = value.shape == expected.shape
            buffers[name] = same_size and np.allclose(value, expected, _RELATIVE, _ABSOLUTE)
    return buffers


def describe_dropped(buffers: Mapping[str, bool]) -> str:
    """Describes in one line for the user what `rotary_buffers` found."""
    names = list(buffers)
    many = f" and {len(names) - 1} more" if len(names) > 1 else ""
    line = f"dropped {names[0]}{many}: rotary positions are computed"
    if other := next((name for name, same in buffers.items() if not same), ""):
        line += f"; {other} does not hold the frequencies of config.json, by which they are"
    return line


def describe_plan(plan: Plan, *, rules: bool = False) -> str:
    """Describes a plan, a line a branch; with `rules` also a line a rule: its tensors, transform and parameters."""
    lines = []
    for branch, entries in plan.entries.items():
        nbytes = sum(plan.tensors[entry.name].nbytes for entry in entries)
        count = sum(entry.size for entry in entries)
        dtypes = "+".join(sorted({plan.tensors[entry.name].dtype.name for entry in entries}))
        lines.append(
            f"{branch}: {len(entries)} tensors, {count:,} values, {nbytes / 2**20:,.1f} MiB of {dtypes} "
            f"<-> {len(plan.leaves[branch])} parameters"
        )
        if rules:
            tensors = Counter(entry.rule for entry in entries)
            lines += [f"  {_describe_rule(branch, rule, number)}" for rule, number in tensors.items()]
    if rules:
        lines += [f"  {name} is computed" for name in plan.buffers]
    if plan.dropped:
        lines.append(describe_dropped(plan.dropped))
    return "\n".join(lines)


def _describe_rule(branch: str, rule: Rule, number: int) -> str:
    parameters = ", ".join(f"{branch}.{name}" for name in rule.parameters)
    stacked = f" stacked by {', '.join(rule.stack)}" if rule.stack else ""
    return f"{rule.tensor} (x{number}) <-> {parameters}{stacked}{f': {rule.transform}' if rule.transform else ''}"
