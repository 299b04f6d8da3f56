"""Prints what documents and media there are and how large, by type.

Of a built data set its builder's measures are read; of a manifest every media file's header is read. `--plot` draws the
distributions, which needs matplotlib (extra `show`).
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.storage.given import given_file, given_manifest
from data_pipelines.datasets.builder.build import PARTS, SKIPPED_FILE
from data_pipelines.datasets.builder.plan import RANGE, Manifest, list_sources, unpack
from data_pipelines.datasets.jobs.job import Job, Unit, run_job
from data_pipelines.datasets.shards import SUFFIX, read_description
from data_pipelines.datasets.sources import ANY_FOLDER
from data_pipelines.documents.manifest import split_manifest
from data_pipelines.documents.measures import KINDS, Measures, collect, join, load_measures, measure_document
from data_pipelines.errors import SampleError, describe_causes, first_of_causes
from data_pipelines.tools.commands import (
    add_media_arguments,
    make_runner,
    run_command,
    skipped_lines,
    trusted_from_options,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".pdf", ".svg")
PERCENTILES = (5, 50, 95, 100)
# Of the figure: bins of a histogram, histograms beside each other, types with a color of their own (the rest is gray).
BINS, COLUMNS, MAX_TYPES = 40, 2, 19


class Quantity(NamedTuple):
    """Something that is measured of each document or medium: its name with the unit, its values, the type of each."""

    name: str
    values: np.ndarray
    types: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("sources", metavar="DIR|MANIFEST", type=given_manifest, nargs="*", help="built datasets, JSONL manifests")
    add_media_arguments(parser)
    add("--plot", metavar="FIGURE", type=given_file, help="draws the distributions: .png, .pdf or .svg")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}, one for each core)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 with one sentence when something given cannot be used."""
    return exit_code(lambda: _show(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("stats", __doc__, add_arguments, run, arguments)


def _show(options: argparse.Namespace) -> None:
    """Prints the tables. Raises ConfigError for sources of which nothing can be used."""
    if not options.sources:
        raise ConfigError("give data sets or manifests to look at")
    if options.plot:
        _check_plot(options.plot)
    # Every table goes by type; what was skipped stands below them, with one example a cause.
    measures, skipped, examples = load(options.sources, options.root, options.workers, trusted_from_options(options))
    causes = describe_causes(skipped, examples)
    if not len(measures):
        names = ", ".join(map(str, options.sources))
        raise ConfigError(
            f"no document of {names} can be used: {'; '.join(causes)}" if causes else f"{names}: no document"
        )
    console = Console(width=max(110, Console().width), highlight=False)
    console.print(modality_table(measures))
    for quantity in quantities(measures):
        if len(quantity.values):
            console.print(distribution_table(quantity, measures.types))
    if skipped:
        print(f"{sum(skipped.values())} documents are skipped:")
        for line in causes:
            print(f"  {line}")
    if options.plot:
        draw_distributions(measures.types, quantities(measures), options.plot)
        print(f"{options.plot}: distributions of {len(measures)} documents")


def _check_plot(path: Path) -> None:
    """Raises ConfigError when nothing could be drawn at `path`: before measuring, which may take long."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path} does not end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: the folder {path.parent} does not exist")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'baichuan_omni_jax[show]'") from error


def load(
    sources: Sequence[Path], root: Path | None, workers: int, trusted: Sequence[Path] = ANY_FOLDER
) -> tuple[Measures, Counter, dict[str, str]]:
    """Reads or measures all documents of data sets (folders) and manifests (files).

    Args:
        sources: built data sets and JSONL manifests.
        root: what media paths of manifests are relative to; None: each manifest's folder.
        workers: processes that measure; 0: this one.
        trusted: the folders that links among the media may lead to.

    Returns:
        The measures, how many documents were skipped by cause, and one sentence for each cause.

    Raises:
        ConfigError: when one of the sources cannot be read.
    """
    # Built data sets were measured when they were built; manifests are measured now, from headers.
    folders = [path for path in sources if path.is_dir()]
    manifests = [path for path in sources if not path.is_dir()]
    tables, skipped, examples = [], Counter(), {}
    for folder in folders:
        description = read_description(folder)
        for shard in description["shards"]:
            path = folder / PARTS / f"{shard['file'].removesuffix(SUFFIX)}.npz"
            try:
                tables.append(load_measures(path))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from error
        causes = description.get("skipped", {})  # seqio_cache skips nothing
        skipped.update(causes)
        if causes and (folder / SKIPPED_FILE).is_file():
            examples = first_of_causes(skipped_lines(folder / SKIPPED_FILE), causes) | examples
    if manifests:
        measured, causes, found = _measure_manifests(list_sources(manifests, root, trusted), workers)
        tables += measured
        skipped += causes
        examples = found | examples
    return join(tables), skipped, examples


def _measure_manifests(sources: Sequence[Manifest], workers: int) -> tuple[list[Measures], Counter, dict[str, str]]:
    with tempfile.TemporaryDirectory() as scratch:
        ranges = [
            lines
            for source in unpack(sources, Path(scratch) / "manifests")
            for lines in split_manifest(source.lines, source.name, source.root, RANGE // 64)
        ]
        # Small ranges: every medium of them is opened, so that a few lines are seconds of work.
        units = [Unit(f"lines-{i:05d}", "", lines, lines.length) for i, lines in enumerate(ranges)]
        job = Job("measuring", units, measure_range, Path(scratch))
        summaries = run_job(job, make_runner("local", workers))
        tables = [load_measures(job.out / f"{unit.name}.npz") for unit in units]
    # One example a cause over all ranges, the first of the manifests.
    skipped = sum((Counter(summary["causes"]) for summary in summaries), Counter())
    examples = [tuple(one) for summary in summaries for one in summary["examples"]]
    return tables, skipped, first_of_causes(examples, skipped)


def measure_range(unit: Unit, folder: Path) -> dict:
    """Measures the documents of a range of manifest lines.

    Returns {"causes": how many are skipped, by cause, "examples": (where, cause, message) of the first of each}.
    """
    measured, skipped, examples = [], Counter(), []
    for line in unit.content.documents():
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            measured.append(measure_document(line.document))
        except SampleError as error:
            if error.cause not in skipped:
                examples.append((f"{unit.content.name}:{line.number}", error.cause, str(error)))
            skipped[error.cause] += 1
    collect(measured).save(folder / f"{unit.name}.npz")
    return {"causes": dict(skipped), "examples": examples}


def quantities(measures: Measures) -> list[Quantity]:
    """Lists all that is measured of documents and media, those without a value too."""
    types = measures.media_type()
    images, video, audio = (
        np.isin(measures.kind, [KINDS.index(kind) for kind in kinds]) for kinds in (_IMAGES, _VIDEO, _AUDIO)
    )
    # A side, not an area: what a user knows of images is how wide they are.
    side = np.sqrt(measures.height.astype(np.float64) * measures.width)
    return [
        Quantity("characters of a document", measures.characters, measures.type),
        Quantity("media of a document", np.diff(measures.media_places), measures.type),
        Quantity("images: square root of the pixels", side[images], types[images]),
        Quantity("videos: square root of the pixels", side[video], types[video]),
        Quantity("videos: seconds", measures.seconds[video], types[video]),
        Quantity("audio: seconds", measures.seconds[audio], types[audio]),
        Quantity("media: KiB", measures.bytes / 1024, types),
    ]


_IMAGES, _VIDEO, _AUDIO = ("image", "frame"), ("video",), ("audio", "speech")


def modality_table(measures: Measures) -> Table:
    """Tabulates how many documents and media of each kind there are, by type."""
    table = _table("documents and media", "documents", *KINDS, "video h", "audio h", "speech h", "MiB")
    types = measures.media_type()
    # A row a type, then one of all.
    for number, name in [*enumerate(measures.types), (None, "all")]:
        own = np.ones(len(types), bool) if number is None else types == number
        documents = len(measures) if number is None else int((measures.type == number).sum())
        counts = [int((own & (measures.kind == kind)).sum()) for kind in range(len(KINDS))]
        seconds = [measures.seconds[own & (measures.kind == KINDS.index(kind))] for kind in (*_VIDEO, *_AUDIO)]
        hours = [f"{part.sum(dtype=np.float64) / 3600:.2f}" for part in seconds]
        size = f"{measures.bytes[own].sum() / 2**20:.1f}"
        table.add_row(name or "(no type)", str(documents), *map(str, counts), *hours, size)
    return table


def distribution_table(quantity: Quantity, types: Sequence[str]) -> Table:
    """Tabulates percentiles of a quantity, by type."""
    table = _table(quantity.name, "count", "mean", *(f"{percent} %" for percent in PERCENTILES[:-1]), "most")
    for number, name in [*enumerate(types), (None, "all")]:
        values = quantity.values if number is None else quantity.values[quantity.types == number]
        if len(values):
            cells = [np.mean(values), *np.percentile(values, PERCENTILES)]
            table.add_row(name or "(no type)", str(len(values)), *(f"{cell:.1f}" for cell in cells))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("type")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def draw_distributions(types: Sequence[str], quantities: Sequence[Quantity], path: Path) -> None:
    """Draws a histogram of each quantity that has values, types stacked, in logarithmic bins.

    Needs matplotlib, which only the functions that draw import. Raises ConfigError when `path` cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [quantity for quantity in quantities if len(quantity.values)]
    table = cast(Any, matplotlib.colormaps["tab20"]).colors  # a list, which the type of a colormap leaves open
    colors = [table[number % 20] if number < MAX_TYPES else (0.6, 0.6, 0.6) for number in range(len(types))]
    rows = -(-len(shown) // COLUMNS)
    height = 3.0 * rows + 1.2
    # A canvas of its own: pyplot would look for a display, and keep every figure.
    figure = Figure(figsize=(14, height), dpi=100)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.04, 1.3 / height, 0.99, 1 - 0.4 / height, wspace=0.09, hspace=0.28)
    for axes, quantity in zip(figure.subplots(max(rows, 1), COLUMNS, squeeze=False).flat, shown, strict=False):
        _draw_histogram(axes, quantity, colors)
    for axes in figure.axes[len(shown) :]:
        axes.set_visible(False)
    handles = [Patch(facecolor=color, label=name or "(no type)") for name, color in zip(types, colors, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=8, fontsize=9, frameon=False)
    try:
        # A dollar sign in a type's name is no formula.
        with matplotlib.rc_context({"text.parse_math": False}):
            figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _draw_histogram(axes: "Axes", quantity: Quantity, colors: Sequence) -> None:
    """Zeros have no place on a logarithmic axis: the title tells how many there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    present = quantity.values > 0
    values, types = quantity.values[present], quantity.types[present]
    zeros = f", {(~present).sum()} more are 0" if not present.all() else ""
    median = f", median {np.median(values):.4g}" if len(values) else ""
    axes.set_title(f"{quantity.name} ({len(values)}{median}{zeros})", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if not len(values):
        return
    # Sizes and lengths spread over powers of ten: equal bins would show one bar.
    edges = np.geomspace(values.min(), max(values.max(), values.min() * 1.1), BINS + 1)
    bottom = np.zeros(BINS)
    for number, color in enumerate(colors):
        counts, _ = np.histogram(values[types == number], edges)
        if counts.any():
            axes.stairs(bottom + counts, edges, baseline=bottom, fill=True, color=color)
            bottom = bottom + counts
    axes.set_xscale("log")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    sys.exit(main())
