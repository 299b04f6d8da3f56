"""Questions about a chart whose answers follow from its table, and descriptions of it, in English and Chinese."""

import random
from decimal import Decimal

import numpy as np

from data_pipelines.synthesis.charts.tables import Chart, spell

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
