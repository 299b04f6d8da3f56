"""A report for people: tables of one chip's memory, groups, collectives and FLOPs."""

from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.train.preflight.report import Report

GIB = 2**30
_NOISE = {"while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map", "cond"}


def print_report(console: Console, report: Report) -> None:
    """Everything but the numbers of single collectives, and whether it fits."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    slices = f"{report.slices} x " if report.slices > 1 else ""
    console.print(
        f"{report.name} on {slices}{report.topology} ({report.chips} x {report.device_kind}), mesh {mesh}; "
        f"traced and compiled in {report.seconds:.0f} s with jax {report.jax}",
        soft_wrap=True,
    )
    for table in (_memory(report), _groups(report), _largest(report), _collectives(report), _flops(report)):
        if table is not None:
            console.print(table)
    console.print(f"FLOPs for {report.packing}", soft_wrap=True)
    verdict = "fits" if report.fits else "does not fit"
    console.print(
        f"{verdict}: {report.peak_bytes / GIB:.2f} GiB of the {report.hbm_bytes / GIB:.2f} GiB that a program may use",
        soft_wrap=True,
    )
    for line in report.suggestions:
        console.print(f"  - {line}", soft_wrap=True)


def _memory(report: Report) -> Table:
    table = _table("memory of a chip", "part", "GiB")
    for name, size in memory_parts(report).items():
        table.add_row(name, _gib(size))
    table.add_row("peak", _gib(report.peak_bytes), style="bold")
    return table


def memory_parts(report: Report) -> dict[str, int]:
    """Bytes of a chip by part, adding up to the peak."""
    parameters = sum(group.parameter_bytes for group in report.groups)
    optimizer = sum(group.optimizer_bytes for group in report.groups)
    return {
        "parameters": parameters,
        "optimizer state": optimizer,
        "batch": report.batch_bytes,
        # Scalars, and what layouts add to arrays.
        "other arguments": report.args_bytes - parameters - optimizer - report.batch_bytes,
        "temporaries": report.temp_bytes,
        "outputs": report.output_bytes,
        "program": report.code_bytes,
    }


def _groups(report: Report) -> Table:
    table = _table(
        "parameters by group", "group", "parameters", "peak learning rate", "parameters GiB", "optimizer GiB"
    )
    for group in report.groups:
        rate = "frozen" if group.learning_rate is None else f"{group.learning_rate:g}"
        own, moments = _gib(group.parameter_bytes), _gib(group.optimizer_bytes)
        table.add_row(group.name, f"{group.parameters:,}", rate, own, moments)
    return table


def _largest(report: Report) -> Table | None:
    if not report.largest:
        return None
    table = _table("largest temporaries (each is the largest at its place in memory)", "GiB", "array", "scope")
    for one in report.largest:
        table.add_row(_gib(one.bytes), one.array, short_scope(one.scope))
    return table


def short_scope(scope: str) -> str:
    """The named scopes of an operation and what it is, without what transformations add.

    >>> short_scope("jit(step)/transpose(jvp(llm))/while/body/checkpoint/mlp/dot_general")
    'backward of llm/mlp/dot_general'
    """
    names = [name[name.rfind("(") + 1 :].rstrip(")") for name in scope.split("/")[1:]]
    kept = [name for name in names if name and name not in _NOISE and "," not in name and "->" not in name]
    return ("backward of " if "transpose(" in scope else "") + "/".join(kept)


def _collectives(report: Report) -> Table | None:
    if report.collectives is None:
        return None
    table = _table("collectives of a step, on each chip", "kind", "mesh axes", "count", "GiB")
    for one in report.collectives:
        table.add_row(one.kind, ", ".join(one.axes), f"{one.count:,}", _gib(one.bytes))
    return table


def _flops(report: Report) -> Table:
    table = _table("model FLOPs of a step, all chips", "part", "TFLOPs", "share")
    total = report.model_flops["total"]
    for name, flops in report.flops_by_part.items():
        if flops:
            table.add_row(name, f"{flops / 1e12:,.1f}", f"{flops / total:.1%}")
    for branch in (name for name in report.model_flops if name != "per_chip"):
        flops = report.model_flops[branch]
        table.add_row(branch, f"{flops / 1e12:,.1f}", f"{flops / total:.1%}", style="bold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.3f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        left = column in ("part", "group", "kind", "mesh axes", "array", "scope")
        table.add_column(column, justify="left" if left or (number == 0 and column != "GiB") else "right")
    return table
