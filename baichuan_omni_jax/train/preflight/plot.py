"""The picture of a report: memory against what the chip has, collectives, FLOPs (needs matplotlib)."""

from pathlib import Path

from matplotlib.figure import Figure

from baichuan_omni_jax.train.preflight.report import Report
from baichuan_omni_jax.train.preflight.tables import GIB, memory_parts

# Distinguishable without colour vision: Okabe and Ito's set.
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#999999", "#E69F00", "#D55E00", "#CC79A7")


def plot(report: Report, path: Path) -> None:
    """Writes the picture (PNG, or what the ending says)."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    memory, groups, moved, work = figure.subplots(4, 1, height_ratios=(1.1, 1.6, 1.8, 2))
    slices = f"{report.slices} x " if report.slices > 1 else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    verdict = "fits" if report.fits else "does not fit"
    figure.suptitle(f"{report.name} on {slices}{report.topology} ({mesh or 'one chip'}): {verdict}", fontweight="bold")
    _memory(memory, report)
    _groups(groups, report)
    _collectives(moved, report)
    _flops(work, report)
    figure.savefig(path, dpi=110)


def _memory(axes, report: Report) -> None:
    left = 0.0
    for colour, (name, size) in zip(COLOURS, memory_parts(report).items(), strict=True):
        width = size / GIB
        if width > 0:
            axes.barh(0, width, left=left, color=colour, label=f"{name} {width:.2f}")
            left += width
    axes.axvline(report.hbm_bytes / GIB, color="black", linewidth=2)
    axes.text(report.hbm_bytes / GIB, 0.45, f"{report.hbm_bytes / GIB:.1f} to use ", ha="right", va="bottom")
    axes.set(xlim=(0, 1.02 * max(left, report.hbm_bytes / GIB)), yticks=[], xlabel="GiB on one chip")
    axes.set_ylim(-0.5, 0.75)
    axes.set_title(f"memory: {report.peak_bytes / GIB:.2f} GiB", loc="left")
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.45), frameon=False, fontsize=8)


def _groups(axes, report: Report) -> None:
    names = [f"{group.name}{' (frozen)' if group.learning_rate is None else ''}" for group in report.groups]
    own = [group.parameter_bytes / GIB for group in report.groups]
    moments = [group.optimizer_bytes / GIB for group in report.groups]
    axes.barh(names, own, color=COLOURS[0], label="parameters")
    axes.barh(names, moments, left=own, color=COLOURS[1], label="optimizer state")
    for place, group in enumerate(report.groups):
        axes.text(own[place] + moments[place], place, f" {group.parameters / 1e6:,.0f} M", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("GiB on one chip")
    axes.set_title("parameters by group", loc="left")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def _collectives(axes, report: Report) -> None:
    axes.set_title("collectives of a step, on each chip", loc="left")
    if report.collectives is None:
        axes.set_axis_off()
        axes.text(0, 0.5, "not known: the compiler refused the program", transform=axes.transAxes)
        return
    shown = report.collectives[:8]
    names = [f"{one.kind} over {', '.join(one.axes)}" for one in shown]
    axes.barh(names, [one.bytes / GIB for one in shown], color=COLOURS[2])
    for place, one in enumerate(shown):
        axes.text(one.bytes / GIB, place, f" {one.bytes / GIB:,.1f} in {one.count:,}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("GiB a step")


def _flops(axes, report: Report) -> None:
    parts = {name: flops for name, flops in report.flops_by_part.items() if flops}
    colour = {"llm": COLOURS[0], "vision": COLOURS[4], "audio": COLOURS[6]}
    axes.barh(list(parts), [flops / 1e12 for flops in parts.values()], color=[colour[n.split()[0]] for n in parts])
    total = report.model_flops["total"]
    for place, flops in enumerate(parts.values()):
        axes.text(flops / 1e12, place, f" {flops / 1e12:,.0f} ({flops / total:.1%})", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("TFLOPs a step, all chips")
    axes.set_title(f"model FLOPs: {total / 1e15:,.2f} PFLOPs a step", loc="left")
