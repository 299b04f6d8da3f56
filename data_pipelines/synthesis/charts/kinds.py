"""Which charts suit a table."""

from dataclasses import dataclass
from decimal import Decimal

from data_pipelines.synthesis.charts.tables import Series, Table

KINDS = ("bar", "line", "scatter", "pie")
MAX_WRITTEN = 16  # numbers that fit on a chart
MAX_SLICES = 8
MIN_SLICE = Decimal("0.03")  # of the whole: a smaller one has no room for its number


@dataclass(frozen=True)
class Chart:
    """What is drawn of a table: one kind, one or more of its columns. A scatter shows the second against the first.

    `written` says that every number stands beside its mark.
    """

    kind: str
    table: Table
    series: tuple[Series, ...]

    @property
    def written(self) -> bool:
        return self.kind != "scatter" and len(self.series) * len(self.table.labels) <= MAX_WRITTEN


def possible_charts(table: Table) -> list[Chart]:
    """Every chart that suits the table; none for a table that is too large for all of them."""
    charts, rows, series = [], len(table.labels), table.series
    for count in range(1, 4):
        if count <= len(series) and count * rows <= MAX_WRITTEN:
            charts.append(Chart("bar", table, series[:count]))
    charts += [Chart("line", table, series[:count]) for count in (1, 2) if count <= len(series) and rows >= 3]
    if len(series) >= 2 and rows >= 5:
        charts.append(Chart("scatter", table, series[:2]))
    return charts + [Chart("pie", table, (one,)) for one in series if rows <= MAX_SLICES and _slices(one)]


def _slices(series: Series) -> bool:
    """Whether the numbers are parts of a whole that can be seen."""
    whole = sum(series.values)
    return whole > 0 and min(series.values) >= MIN_SLICE * whole
