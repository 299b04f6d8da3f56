"""Tables from the text of a document: CSV, or rows in JSON.

    # Rainfall                          {"title": "Rainfall",
    city,May,June                        "rows": [{"city": "Oslo", "May": 53, "June": 68},
    Oslo,53,68                                    {"city": "Rome", "May": 34, "June": 27}]}
    Rome,34,27

The first column names the rows. Of the others those that hold numbers alone are kept.
"""

import csv
import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

from data_pipelines.errors import SampleError
from data_pipelines.synthesis.pages.layout import normalize

MAX_ROWS = 40
MAX_NAME = 60  # characters of a title, a label, the name of a column
MAX_DIGITS = 10
SMALLEST, LARGEST = -6, 11  # powers of ten: what is left can be written on a chart, and subtracted exactly


@dataclass(frozen=True)
class Series:
    """A named column of numbers."""

    name: str
    values: tuple[Decimal, ...]


@dataclass(frozen=True)
class Table:
    """Numbers by row: `labels` names the rows, `header` says what the labels are; `title` may be ""."""

    title: str
    header: str
    labels: tuple[str, ...]
    series: tuple[Series, ...]

    @property
    def words(self) -> str:
        """All that is written on a chart of it but for the digits."""
        return " ".join((self.title, self.header, *self.labels, *(series.name for series in self.series)))


def read_table(text: str) -> Table:
    """Reads the table in a document's text. Raises SampleError "bad_table" when there is none, or none that can be
    drawn.
    """
    try:
        # JSON by its first character: CSV whose first cell begins so would be no table of ours.
        title, rows = _json_rows(text) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise SampleError("bad_table", f"the table cannot be read: {error}") from error
    # The form: rows of one length, few enough for a chart.
    if len(rows) < 3 or len(rows) > MAX_ROWS + 1 or len(rows[0]) < 2:
        raise SampleError("bad_table", f"a table has a header and 2 to {MAX_ROWS} rows of at least 2 columns")
    if any(len(row) != len(rows[0]) for row in rows):
        raise SampleError("bad_table", "the rows of the table differ in length")
    # The columns: a name and numbers alone, others are left out.
    header, *names = (_clean(cell) for cell in rows[0])
    labels = tuple(_clean(row[0]) for row in rows[1:])
    columns = [[number(row[i]) for row in rows[1:]] for i in range(1, len(rows[0]))]
    kept = zip(names, columns, strict=True)
    series = tuple(
        Series(name, tuple(value for value in column if value is not None))
        for name, column in kept
        if name and None not in column
    )
    if any(len(name) > MAX_NAME for name in (_clean(title), header, *names, *labels)):
        raise SampleError("bad_table", f"a title, a label or a column's name is longer than {MAX_NAME} characters")
    named = [one.name for one in series]
    if not series or not all((header, *labels)) or len(set(labels)) < len(labels) or len(set(named)) < len(named):
        raise SampleError("bad_table", "the table needs a name for each row, all different, and a column of numbers")
    return Table(_clean(title), header, labels, series)


def number(cell: str | int | Decimal | None) -> Decimal | None:
    """Reads the number in a cell, commas between thousands left out; None when there is none, or one too long
    to print.
    """
    try:
        value = Decimal(re.sub(r"(?<=\d),(?=\d{3})", "", str(cell).strip()))
    except InvalidOperation:
        return None
    if not value.is_finite() or len(value.as_tuple().digits) > MAX_DIGITS:
        return None
    return value if not value or SMALLEST <= value.adjusted() <= LARGEST else None


def spell(value: Decimal) -> str:
    """Spells a number as it is written on the chart and in answers: no exponent, no zeros behind the last digit.

    >>> spell(Decimal("1200.50")), spell(Decimal("3E2"))
    ('1200.5', '300')
    """
    text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if not value else text


def _csv_rows(text: str) -> tuple[str, list[list[str]]]:
    lines = text.strip().splitlines()
    title = lines.pop(0).lstrip("# ") if lines and lines[0].startswith("#") else ""
    return title, [row for row in csv.reader(lines, strict=True, skipinitialspace=True) if row]


def _json_rows(text: str) -> tuple[str, list[list]]:
    values = json.loads(text, parse_float=Decimal)
    title, rows = (str(values.get("title") or ""), values.get("rows")) if isinstance(values, dict) else ("", values)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row for row in rows) or not rows:
        raise ValueError('"rows" must be a list of objects')
    names = list(rows[0])
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError("the rows have different keys")
    return title, [names, *([row[name] for name in names] for row in rows)]


def _clean(cell: object) -> str:
    return normalize("" if cell is None else str(cell)).replace("\n", " ")


ChartKind = Literal["bar", "line", "scatter", "pie"]
MAX_WRITTEN = 16  # numbers that fit on a chart
MAX_SLICES = 8
MIN_SLICE = Decimal("0.03")  # of the whole: a smaller one has no room for its number


@dataclass(frozen=True)
class Chart:
    """What is drawn of a table: one kind, one or more of its columns. A scatter shows the second against the first.

    `written` says that every number stands beside its mark.
    """

    kind: ChartKind
    table: Table
    series: tuple[Series, ...]

    @property
    def written(self) -> bool:
        """Whether every number stands beside its mark."""
        return self.kind != "scatter" and len(self.series) * len(self.table.labels) <= MAX_WRITTEN


def possible_charts(table: Table) -> list[Chart]:
    """Returns every chart that suits the table; none for a table that is too large for all of them."""
    charts, rows, series = [], len(table.labels), table.series

    def pie(one: Series) -> bool:
        whole = sum(one.values)
        return whole > 0 and min(one.values) >= MIN_SLICE * whole

    # Bars while their numbers can be written, lines from three points on, a scatter from five, a pie of visible parts.
    for count in range(1, 4):
        if count <= len(series) and count * rows <= MAX_WRITTEN:
            charts.append(Chart("bar", table, series[:count]))
    charts += [Chart("line", table, series[:count]) for count in (1, 2) if count <= len(series) and rows >= 3]
    if len(series) >= 2 and rows >= 5:
        charts.append(Chart("scatter", table, series[:2]))
    return charts + [Chart("pie", table, (one,)) for one in series if rows <= MAX_SLICES and pie(one)]
