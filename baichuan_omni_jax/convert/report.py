"""A plan in words: what `--dry-run` prints."""

from collections import Counter

from baichuan_omni_jax.convert.buffers import describe_dropped
from baichuan_omni_jax.convert.plan import Plan
from baichuan_omni_jax.convert.rules import Rule


def describe_plan(plan: Plan, *, rows: bool = False) -> str:
    """One line a branch; with `rows` also one a rule: their name, how many tensors, the transform, our parameters."""
    lines = []
    for branch, entries in plan.entries.items():
        nbytes = sum(plan.tensors[entry.name].nbytes for entry in entries)
        count = sum(entry.size for entry in entries)
        dtypes = "+".join(sorted({plan.tensors[entry.name].dtype.name for entry in entries}))
        lines.append(
            f"{branch}: {len(entries)} tensors, {count:,} values, {nbytes / 2**20:,.1f} MiB of {dtypes} "
            f"<-> {len(plan.leaves[branch])} parameters"
        )
        if rows:
            tensors = Counter(entry.rule for entry in entries)
            lines += [f"  {_row(branch, rule, number)}" for rule, number in tensors.items()]
    if rows:
        lines += [f"  {name} is computed" for name in plan.buffers]
    if plan.dropped:
        lines.append(describe_dropped(plan.dropped))
    return "\n".join(lines)


def _row(branch: str, rule: Rule, number: int) -> str:
    ours = ", ".join(f"{branch}.{target}" for target in rule.targets)
    stacked = f" stacked by {', '.join(rule.stack)}" if rule.stack else ""
    return f"{rule.theirs} (x{number}) <-> {ours}{stacked}{f': {rule.transform}' if rule.transform else ''}"
