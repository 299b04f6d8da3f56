"""What a suite's scores look like: a table with the report's figures beside ours, and the same for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from baichuan_omni_jax.evaluation.suites.scoring import GroupScore, interval, resample
from baichuan_omni_jax.evaluation.suites.table import Published
from baichuan_omni_jax.storage import write_json

COLUMNS = ("", "items", "score %", "95 % interval", "of 10", "report", "invalid", "left out")


@dataclass(frozen=True)
class Measure:
    """A mean, or a rate, over `items` of a suite, and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float
    items: int


def measure(got: Sequence[float], of: Sequence[float] | None = None, scale: float = 1.0) -> Measure:
    """Makes a measure of the sum of `got` over that of `of` (default: their number), times `scale`."""
    of = [1.0] * len(got) if of is None else of
    low, high = interval(scale * resample(got, of))
    return Measure(scale * float(sum(got)) / float(sum(of)), low, high, len(got))


@dataclass(frozen=True, kw_only=True)
class SuiteScores:
    """The scores of one suite.

    Attributes:
        suite: its name.
        title: of its table.
        groups: the scores; the first is that of all items.
        published: the report's figures, by group.
        rates: whether a score is of errors over units, of which fewer are better.
        of_ten: whether its scores are also told on a scale of 0 to 10.
        measures: other measures, such as those of speech.
        notes: sentences about how it was measured, and what went wrong.
    """

    suite: str
    title: str
    groups: Sequence[GroupScore]
    published: Mapping[str, Published] = field(default_factory=dict)
    rates: bool = False
    of_ten: bool = False
    measures: Mapping[str, Measure] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def incomplete(self) -> bool:
        """Whether items wait for a verdict that the same command would ask for again."""
        return any(group.problems.get("not_judged") for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """The scores with the report's figures, in percent and as printed."""
        groups = []
        for group in self.groups:
            report = self.published.get(group.name)
            printed = (
                {"report": report.value, "report_of": report.of, "report_percent": report.percent} if report else {}
            )
            groups.append(asdict(group) | printed)
        rest = {name: getattr(self, name) for name in ("suite", "title", "notes")}
        rest["measures"] = {name: asdict(found) for name, found in self.measures.items()}
        return rest | {"unit": "percent errors" if self.rates else "percent", "groups": groups}


def write_scores(path: Path, scores: SuiteScores) -> None:
    """Writes the scores as JSON, whole or not at all."""
    write_json(path, json.loads(json.dumps(scores.as_json())))


def table_of(scores: SuiteScores) -> str:
    """Draws the scores as a table in Markdown, with what else there is to say below it."""
    # Columns that would be empty in every row are left out.
    rows = [_row(scores, group) for group in scores.groups]
    used = [n for n, name in enumerate(COLUMNS) if n < 4 or (any(row[n] for row in rows) and name)]
    lines = [[COLUMNS[n] for n in used], *([row[n] for n in used] for row in rows)]
    lines[0][0] = scores.title
    widths = [max(len(line[n]) for line in lines) for n in range(len(used))]
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    drawn += [
        f"{name}: {found.value:.3g} ({found.low:.3g} to {found.high:.3g}, of {found.items})"
        for name, found in scores.measures.items()
    ]
    return "\n".join([*drawn, *scores.notes])


def _row(scores: SuiteScores, group: GroupScore) -> list[str]:
    report = scores.published.get(group.name)
    printed = f"{report.value:g} of 10 ({report.percent:.1f} %)" if report and report.of == 10 else ""
    left_out = ", ".join(f"{count} {why}" for why, count in group.problems.items())
    return [
        group.name,
        str(group.items),
        "–" if group.value is None else f"{group.value:.1f}",
        "" if group.low is None or group.high is None else f"{group.low:.1f} to {group.high:.1f}",
        f"{group.value / 10:.2f}" if scores.of_ten and group.value is not None else "",
        printed or (f"{report.value:g} %" if report else ""),
        str(group.invalid) if group.invalid else "",
        left_out,
    ]
