"""Preflight of a run in many ways: every combination of some settings, as a table and a figure, fastest first."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.preflight.report import Report

GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """One combination of settings, with its report, or why there is none."""

    settings: dict[str, str]
    report: Report | None
    why: str = ""

    @property
    def rate(self) -> float:
        """Predicted tokens a second and chip; less than 0 where it does not fit, least where it could not be tried."""
        if self.report is None:
            return -2.0
        if not self.report.fits:
            return -1.0
        time = self.report.time
        return self.report.counts["tokens"] / self.report.chips / time.total_s if time else 0.0

    def to_json(self) -> dict[str, Any]:
        """Turns everything into plain dicts and lists."""
        return {"settings": self.settings, "report": self.report and self.report.to_json(), "why": self.why}


def parse_sweep(items: Sequence[str]) -> list[dict[str, str]]:
    """Reads `KEY=A,B` strings; returns every combination, the first key's values changing slowest.

    >>> parse_sweep(["mesh.fsdp=8,16", "compute.remat=full"])
    [{'mesh.fsdp': '8', 'compute.remat': 'full'}, {'mesh.fsdp': '16', 'compute.remat': 'full'}]

    Raises ConfigError for an item of another form, or a key that comes twice.
    """
    values: dict[str, list[str]] = {}
    for item in items:
        key, found, listed = item.partition("=")
        if not found or not key.strip() or not all(value.strip() for value in listed.split(",")):
            raise ConfigError(f"--sweep {item!r} is not of the form KEY=VALUE,VALUE,...")
        if key.strip() in values:
            raise ConfigError(f"--sweep has {key.strip()} twice: all of a key's values belong to one")
        values[key.strip()] = [value.strip() for value in listed.split(",")]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def sweep(combinations: Sequence[dict[str, str]], check: Callable[[dict[str, str]], Report]) -> Iterator[Cell]:
    """Yields a cell for each combination as soon as it was tried; one that cannot be is no error."""
    for settings in combinations:
        try:
            yield Cell(settings, check(settings))
        except ConfigError as error:
            yield Cell(settings, None, str(error))


def sweep_table(cells: Sequence[Cell]) -> Table:
    """Lists cells, fastest first; what does not fit, or could not be tried, last."""
    keys = list(cells[0].settings)
    table = Table(title="predicted, not measured", title_justify="left")
    for name in (*keys, "GiB a chip", "s a step", "tokens/s a chip", "MFU", "most of it"):
        table.add_column(name, justify="left" if name in (*keys, "most of it") else "right")
    for cell in sorted(cells, key=lambda cell: -cell.rate):
        settings, report = cell.settings.values(), cell.report
        if report is None:
            table.add_row(*settings, "", "", "", "", cell.why)
            continue
        memory = f"{report.peak_bytes / GIB:.1f} of {report.hbm_bytes / GIB:.1f}"
        time = report.time
        if not report.fits or time is None:
            table.add_row(*settings, memory, "", "", "", "" if report.fits else "does not fit")
            continue
        numbers = f"{time.total_s:.2f}", f"{cell.rate:,.0f}", f"{time.mfu:.1%}"
        table.add_row(*settings, memory, *numbers, f"{time.binds}; {time.exposed_s / time.total_s:.0%} exposed")
    return table


def plot_sweep(cells: Sequence[Cell], path: Path) -> None:
    """Draws what a step consists of in each cell that fits, fastest first, into `path` (PNG, or as its ending says)."""
    # An extra, so imported only where a figure is wanted.
    from matplotlib.figure import Figure

    from baichuan_omni_jax.train.preflight.render import COLORS

    shown = [cell for cell in sorted(cells, key=lambda cell: -cell.rate) if cell.rate > 0]
    figure = Figure(figsize=(11, 1.5 + 0.4 * max(len(shown), 1)), layout="constrained")
    axes = figure.subplots()
    axes.set_title("predicted time of a step", loc="left")
    names = [", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in cell.settings.items()) for cell in shown]
    left = [0.0] * len(shown)
    for color, part in zip(COLORS, ("products", "kernels", "memory", "exposed"), strict=False):
        widths = [getattr(cell.report.time, f"{part}_s") for cell in shown if cell.report and cell.report.time]
        axes.barh(names, widths, left=left, color=color, label=part)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    for place, cell in enumerate(shown):
        if cell.report and cell.report.time:
            axes.text(left[place], place, f" MFU {cell.report.time.mfu:.0%}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
