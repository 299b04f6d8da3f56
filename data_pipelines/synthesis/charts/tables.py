"""Tables from the text of a document (CSV, or rows in JSON), the charts that suit one, and questions about them.

    # Rainfall                          {"title": "Rainfall",
    city,May,June                        "rows": [{"city": "Oslo", "May": 53, "June": 68},
    Oslo,53,68                                    {"city": "Rome", "May": 34, "June": 27}]}
    Rome,34,27

The first column names the rows. Of the others those that hold numbers alone are kept. Answers follow from
the table, in English and Chinese.
"""

import csv
import json
import random
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Literal

import numpy as np

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


Pair = tuple[str, str]  # a question and its answer

VISIBLE = Decimal("0.02")  # of the range: a smaller lead cannot be seen where no numbers are written
CLEAR, UNCLEAR = 0.7, 0.15  # correlations that count as a trend, and as none

_KIND = {
    "en": {"bar": "bar chart", "line": "line chart", "scatter": "scatter plot", "pie": "pie chart"},
    "zh": {"bar": "柱状图", "line": "折线图", "scatter": "散点图", "pie": "饼图"},
}
_ASK = {
    "en": {
        "max": ("Which {header} has the highest “{series}”?", "{label}, with {value}."),
        "min": ("Which {header} has the lowest “{series}”?", "{label}, with {value}."),
        "value": ("What is the value of “{series}” for {label}?", "{value}."),
        "difference": ("By how much is “{series}” higher for {label} than for {other}?", "By {value}."),
        "rise": ("Does “{series}” rise or fall from {label} to {other}?", "It rises, from {first} to {last}."),
        "fall": ("Does “{series}” rise or fall from {label} to {other}?", "It falls, from {first} to {last}."),
        "count": ("How many values of {header} does the chart show?", "{count}."),
        "max_unwritten": ("Which {header} has the highest “{series}”?", "{label}."),
        "min_unwritten": ("Which {header} has the lowest “{series}”?", "{label}."),
        "rise_unwritten": ("Does “{series}” rise or fall from {label} to {other}?", "It rises."),
        "fall_unwritten": ("Does “{series}” rise or fall from {label} to {other}?", "It falls."),
        "together": ("How does “{series}” change with “{against}”?", "The higher “{against}”, the higher “{series}”."),
        "opposed": ("How does “{series}” change with “{against}”?", "The higher “{against}”, the lower “{series}”."),
        "unrelated": ("How does “{series}” change with “{against}”?", "The points show no clear trend."),
    },
    "zh": {
        "max": ("哪个“{header}”的“{series}”最高？", "{label}，为{value}。"),
        "min": ("哪个“{header}”的“{series}”最低？", "{label}，为{value}。"),
        "value": ("“{label}”的“{series}”是多少？", "{value}。"),
        "difference": ("“{label}”的“{series}”比“{other}”高多少？", "高{value}。"),
        "rise": ("从“{label}”到“{other}”，“{series}”是上升还是下降？", "上升，从{first}升到{last}。"),
        "fall": ("从“{label}”到“{other}”，“{series}”是上升还是下降？", "下降，从{first}降到{last}。"),
        "count": ("图中一共有多少个“{header}”？", "{count}个。"),
        "max_unwritten": ("哪个“{header}”的“{series}”最高？", "{label}。"),
        "min_unwritten": ("哪个“{header}”的“{series}”最低？", "{label}。"),
        "rise_unwritten": ("从“{label}”到“{other}”，“{series}”是上升还是下降？", "上升。"),
        "fall_unwritten": ("从“{label}”到“{other}”，“{series}”是上升还是下降？", "下降。"),
        "together": ("“{series}”随“{against}”怎样变化？", "“{against}”越高，“{series}”也越高。"),
        "opposed": ("“{series}”随“{against}”怎样变化？", "“{against}”越高，“{series}”越低。"),
        "unrelated": ("“{series}”随“{against}”怎样变化？", "各点没有明显的趋势。"),
    },
}
_DESCRIBE = {
    "en": {
        "whole": "This {kind} shows {series} by {header}, {count} values in all.",
        "scatter": "This {kind} shows {series} against {against}, {count} points in all.",
        "max": "The highest “{series}” is that of {label} ({value}).",
        "min": "The lowest “{series}” is that of {label} ({value}).",
        "max_unwritten": "The highest “{series}” is that of {label}.",
        "min_unwritten": "The lowest “{series}” is that of {label}.",
        "rise": "From {label} to {other}, “{series}” rises from {first} to {last}.",
        "fall": "From {label} to {other}, “{series}” falls from {first} to {last}.",
        "rise_unwritten": "From {label} to {other}, “{series}” rises.",
        "fall_unwritten": "From {label} to {other}, “{series}” falls.",
        "together": "The higher “{against}”, the higher “{series}”.",
        "opposed": "The higher “{against}”, the lower “{series}”.",
        "unrelated": "The points show no clear trend.",
    },
    "zh": {
        "whole": "这张{kind}显示了各“{header}”的{series}，共{count}项。",
        "scatter": "这张{kind}显示了“{series}”与“{against}”的关系，共{count}个点。",
        "max": "“{series}”最高的是{label}，为{value}。",
        "min": "“{series}”最低的是{label}，为{value}。",
        "max_unwritten": "“{series}”最高的是{label}。",
        "min_unwritten": "“{series}”最低的是{label}。",
        "rise": "从{label}到{other}，“{series}”从{first}升到{last}。",
        "fall": "从{label}到{other}，“{series}”从{first}降到{last}。",
        "rise_unwritten": "从{label}到{other}，“{series}”上升。",
        "fall_unwritten": "从{label}到{other}，“{series}”下降。",
        "together": "“{against}”越高，“{series}”也越高。",
        "opposed": "“{against}”越高，“{series}”越低。",
        "unrelated": "各点没有明显的趋势。",
    },
}
_AND = {"en": " and ", "zh": "和"}

Fact = tuple[str, dict[str, str]]  # what is true of a chart (a key of the tables above), and what it is true of


def questions(chart: Chart, rng: random.Random, language: str) -> list[Pair]:
    """Asks every kind of question that the chart can answer, in an order that `rng` chooses."""
    # Facts first, words later: every question is a true statement about the table in another form.
    facts = [*_facts(chart), *_readings(chart, rng)]
    if chart.kind != "scatter":  # points may lie upon each other
        facts.append(("count", {"count": str(len(chart.table.labels))}))
    rng.shuffle(facts)
    forms = ((*_ASK[language][key], _words(chart, values)) for key, values in facts)
    return [(question.format_map(words), answer.format_map(words)) for question, answer, words in forms]


def describe(chart: Chart, language: str) -> str:
    """Describes what the chart shows, its extremes and its trend."""
    names = [series.name for series in chart.series]
    whole = {
        "kind": _KIND[language][chart.kind],
        "series": names[1] if chart.kind == "scatter" else _AND[language].join(names),
        "count": str(len(chart.table.labels)),
    }
    facts = [("scatter" if chart.kind == "scatter" else "whole", whole), *_facts(chart)]
    sentences = [_DESCRIBE[language][key].format_map(_words(chart, values)) for key, values in facts]
    return ("" if language == "zh" else " ").join(sentences)


def transcribe(chart: Chart) -> str:
    """Transcribes the numbers of a chart on which all are written, as lines of comma-separated values."""
    header = [chart.table.header, *(series.name for series in chart.series)]
    columns = [chart.table.labels, *([spell(value) for value in series.values] for series in chart.series)]
    return "\n".join(", ".join(row) for row in [header, *zip(*columns, strict=True)])


def _words(chart: Chart, values: dict[str, str]) -> dict[str, str]:
    return {"header": chart.table.header, "against": chart.series[0].name, **values}


def _facts(chart: Chart) -> list[Fact]:
    """Finds extremes and trends that can be seen in the chart."""
    if chart.kind == "scatter":
        return _trend(chart)
    facts, ending = [], "" if chart.written else "_unwritten"
    for series in chart.series:
        # A lead that cannot be read off is no fact: where no numbers are written, a share of the range.
        spread = max(series.values) - min(series.values)
        lead = Decimal(0) if chart.written else VISIBLE * spread
        ordered = sorted(zip(series.values, chart.table.labels, strict=True), key=lambda pair: pair[0])
        for key, (value, label), (next_value, _) in (("max", *ordered[:-3:-1]), ("min", *ordered[:2])):
            if abs(value - next_value) > lead:
                facts.append((key + ending, {"series": series.name, "label": label, "value": spell(value)}))
        if chart.kind == "line" and abs(series.values[-1] - series.values[0]) > lead:
            labels, (start, *_, end) = chart.table.labels, series.values
            ends = {"label": labels[0], "other": labels[-1], "first": spell(start), "last": spell(end)}
            facts.append((("rise" if end > start else "fall") + ending, {"series": series.name, **ends}))
    return facts


def _trend(chart: Chart) -> list[Fact]:
    x, y = (np.array(list(map(float, series.values))) for series in chart.series)
    if x.std() == 0 or y.std() == 0:
        return []
    # Between a trend and none lies what nobody should be asked about.
    correlation = float(np.corrcoef(x, y)[0, 1])
    values = {"series": chart.series[1].name}
    if abs(correlation) <= UNCLEAR:
        return [("unrelated", values)]
    return [("together" if correlation > 0 else "opposed", values)] if abs(correlation) >= CLEAR else []


def _readings(chart: Chart, rng: random.Random) -> list[Fact]:
    """Asks for a number read off the chart, and the difference of two."""
    if not chart.written:
        return []
    series = rng.choice(chart.series)
    (low, less), (high, more) = sorted(
        rng.sample(list(zip(series.values, chart.table.labels, strict=True)), 2), key=lambda pair: pair[0]
    )
    facts = [("value", {"series": series.name, "label": more, "value": spell(high)})]
    if high > low:
        values = {"series": series.name, "label": more, "other": less, "value": spell(high - low)}
        facts.append(("difference", values))
    return facts
