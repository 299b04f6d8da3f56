"""A preflight report for people: tables on a console, and one figure (which needs matplotlib)."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.train.preflight.fit import RematFit
from baichuan_omni_jax.train.preflight.report import Report
from baichuan_omni_jax.train.preflight.step_time import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
_NOISE = {"while", "body", "closed_call", "checkpoint", "rematted_computation", "shard_map", "cond"}


def print_report(console: Console, report: Report) -> None:
    """Prints everything but the numbers of single collectives, and whether it fits."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    slices = f"{report.slices} x " if report.slices > 1 else ""
    console.print(
        f"{report.name} on {slices}{report.topology} ({report.chips} x {report.device_kind}), mesh {mesh}; "
        f"traced and compiled in {report.seconds:.0f} s with jax {report.jax}",
        soft_wrap=True,
    )
    if report.remat_fit is not None:
        console.print(fit_sentence(report.remat_fit), soft_wrap=True)
    for table in (
        _memory_table(report),
        _groups_table(report),
        _largest_table(report),
        _collectives_table(report),
        _flops_table(report),
    ):
        if table is not None:
            console.print(table)
    console.print(f"FLOPs for {report.packing}", soft_wrap=True)
    if report.time is not None:
        for line in time_sentences(report, report.time):
            console.print(line, soft_wrap=True)
    verdict = "fits" if report.fits else "does not fit"
    console.print(
        f"{verdict}: {report.peak_bytes / GIB:.2f} GiB of the {report.hbm_bytes / GIB:.2f} GiB that a program may use",
        soft_wrap=True,
    )
    for line in report.suggestions:
        console.print(f"  - {line}", soft_wrap=True)


def time_sentences(report: Report, time: StepTime) -> list[str]:
    """Says what a step is predicted to take, and what that needs of the hosts."""
    tokens = report.counts["tokens"] / report.chips / time.total_s
    parts = (
        f"products {time.products_s:.2f}, attention kernels {time.kernels_s:.2f}, memory {time.memory_s:.2f}, "
        f"exchanges {time.exposed_s:.2f} (and {time.hidden_s:.2f} behind products)"
    )
    return [
        f"predicted, not measured: {time.total_s:.2f} s a step ({parts}), {tokens:,.0f} tokens/s a chip, "
        f"MFU {time.mfu:.1%}, HFU {time.hfu:.1%}; most of it {time.binds}",
        f"the hosts together must decode {report.rows / time.total_s:.2f} rows/s",
    ]


def cost_sentence(report: Report, time: StepTime, tokens: float, price: float | None) -> str:
    """Says how long `tokens` take, and what they cost at `price` a chip and hour."""
    hours = tokens / report.counts["tokens"] * time.total_s / 3600
    cost = "" if price is None else f", {hours * report.chips * price:,.0f} at {price:g} a chip and hour"
    return f"predicted for {tokens:.3g} tokens: {hours:,.1f} hours on {report.chips} chips{cost}"


def fit_sentence(fit: RematFit) -> str:
    """Says what `compute.remat=fit` chose, and what would have been too much."""
    left_out = ", ".join(f"{name} ({size / GIB:.1f} GiB with it)" for name, size in fit.too_large.items())
    return (
        f"compute.remat=fit: {fit.remat}; {fit.compiled.get(fit.remat, 0) / GIB:.1f} GiB instead of "
        f"{fit.compiled['full'] / GIB:.1f} with full, of {fit.hbm_bytes / GIB:.1f}"
        + (f"; too large: {left_out}" if left_out else "")
    )


def _memory_table(report: Report) -> Table:
    table = _table("memory of a chip", "part", "GiB")
    for name, size in memory_parts(report).items():
        table.add_row(name, _gib(size))
    table.add_row("peak", _gib(report.peak_bytes), style="bold")
    return table


def memory_parts(report: Report) -> dict[str, int]:
    """Splits the bytes of a chip by part, adding up to the peak."""
    # What is left of the arguments are scalars and padding.
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


def _groups_table(report: Report) -> Table:
    table = _table(
        "parameters by group", "group", "parameters", "peak learning rate", "parameters GiB", "optimizer GiB"
    )
    for group in report.groups:
        rate = "frozen" if group.learning_rate is None else f"{group.learning_rate:g}"
        own, moments = _gib(group.parameter_bytes), _gib(group.optimizer_bytes)
        table.add_row(group.name, f"{group.parameters:,}", rate, own, moments)
    return table


def _largest_table(report: Report) -> Table | None:
    # Known only where the compiler's dump could be read.
    if not report.largest:
        return None
    table = _table("largest temporaries (each is the largest at its place in memory)", "GiB", "array", "scope")
    for one in report.largest:
        table.add_row(_gib(one.bytes), one.array, short_scope(one.scope))
    return table


def short_scope(scope: str) -> str:
    """Shortens the named scopes of an operation and what it is, without what transformations add.

    >>> short_scope("jit(step)/transpose(jvp(llm))/while/body/checkpoint/mlp/dot_general")
    'backward of llm/mlp/dot_general'
    """
    # jvp(...), transpose(...) wrap a scope's name; loops and remat add words of their own.
    names = [name[name.rfind("(") + 1 :].rstrip(")") for name in scope.split("/")[1:]]
    kept = [name for name in names if name and name not in _NOISE and "," not in name and "->" not in name]
    return ("backward of " if "transpose(" in scope else "") + "/".join(kept)


def _collectives_table(report: Report) -> Table | None:
    if report.collectives is None:
        return None
    table = _table("collectives of a step, on each chip", "kind", "mesh axes", "count", "GiB")
    for one in report.collectives:
        table.add_row(one.kind, ", ".join(one.axes), f"{one.count:,}", _gib(one.bytes))
    return table


def _flops_table(report: Report) -> Table:
    table = _table("model FLOPs of a step, all chips", "part", "TFLOPs", "share")
    total = report.model_flops["total"]
    # Terms that the run does not compute are left out; then the sums by branch.
    for name, flops in report.flops_by_term.items():
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


# Distinguishable without color vision: Okabe and Ito's set.
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#999999", "#E69F00", "#D55E00", "#CC79A7")


def plot(report: Report, path: Path) -> None:
    """Draws memory against what the chip has, collectives and FLOPs, into `path` (PNG, or what the ending says)."""
    # An extra, so imported only where a figure is wanted.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    memory, groups, moved, work = figure.subplots(4, 1, height_ratios=(1.1, 1.6, 1.8, 2))
    slices = f"{report.slices} x " if report.slices > 1 else ""
    # Title: what runs where, and the verdict.
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    verdict = "fits" if report.fits else "does not fit"
    figure.suptitle(f"{report.name} on {slices}{report.topology} ({mesh or 'one chip'}): {verdict}", fontweight="bold")
    _plot_memory(memory, report)
    _plot_groups(groups, report)
    _plot_collectives(moved, report)
    _plot_flops(work, report)
    figure.savefig(path, dpi=110)


def _plot_memory(axes: "Axes", report: Report) -> None:
    # One bar, part after part, with the chip's memory as a line.
    left = 0.0
    for color, (name, size) in zip(COLORS, memory_parts(report).items(), strict=True):
        width = size / GIB
        if width > 0:
            axes.barh(0, width, left=left, color=color, label=f"{name} {width:.2f}")
            left += width
    axes.axvline(report.hbm_bytes / GIB, color="black", linewidth=2)
    axes.text(report.hbm_bytes / GIB, 0.45, f"{report.hbm_bytes / GIB:.1f} to use ", ha="right", va="bottom")
    axes.set(xlim=(0, 1.02 * max(left, report.hbm_bytes / GIB)), yticks=[], xlabel="GiB on one chip")
    axes.set_ylim(-0.5, 0.75)
    axes.set_title(f"memory: {report.peak_bytes / GIB:.2f} GiB", loc="left")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45), frameon=False, fontsize=8)


def _plot_groups(axes: "Axes", report: Report) -> None:
    names = [f"{group.name}{' (frozen)' if group.learning_rate is None else ''}" for group in report.groups]
    own = [group.parameter_bytes / GIB for group in report.groups]
    moments = [group.optimizer_bytes / GIB for group in report.groups]
    axes.barh(names, own, color=COLORS[0], label="parameters")
    axes.barh(names, moments, left=own, color=COLORS[1], label="optimizer state")
    for place, group in enumerate(report.groups):
        axes.text(own[place] + moments[place], place, f" {group.parameters / 1e6:,.0f} M", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("GiB on one chip")
    axes.set_title("parameters by group", loc="left")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def _plot_collectives(axes: "Axes", report: Report) -> None:
    axes.set_title("collectives of a step, on each chip", loc="left")
    if report.collectives is None:
        axes.set_axis_off()
        axes.text(0, 0.5, "not known: the compiler refused the program", transform=axes.transAxes)
        return
    # Most bytes first; the rest would be too small to see.
    shown = report.collectives[:8]
    names = [f"{one.kind} over {', '.join(one.axes)}" for one in shown]
    axes.barh(names, [one.bytes / GIB for one in shown], color=COLORS[2])
    for place, one in enumerate(shown):
        axes.text(one.bytes / GIB, place, f" {one.bytes / GIB:,.1f} in {one.count:,}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("GiB a step")


def _plot_flops(axes: "Axes", report: Report) -> None:
    parts = {name: flops for name, flops in report.flops_by_term.items() if flops}
    color = {"llm": COLORS[0], "vision": COLORS[4], "audio": COLORS[6]}
    axes.barh(list(parts), [flops / 1e12 for flops in parts.values()], color=[color[n.split()[0]] for n in parts])
    total = report.model_flops["total"]
    for place, flops in enumerate(parts.values()):
        axes.text(flops / 1e12, place, f" {flops / 1e12:,.0f} ({flops / total:.1%})", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("TFLOPs a step, all chips")
    axes.set_title(f"model FLOPs: {total / 1e15:,.2f} PFLOPs a step", loc="left")
