"""Scores of raw answers, and what they look like: a table with the report's figures beside ours."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.evaluation.suites.items import Item
from baichuan_omni_jax.evaluation.suites.judges import RUBRICS, CachedJudge, Case, Rubric
from baichuan_omni_jax.evaluation.suites.scoring import (
    GroupScore,
    ItemScore,
    choice_letter,
    contains_match,
    count_errors,
    exact_match,
    interval,
    resample,
    score_groups,
)
from baichuan_omni_jax.evaluation.suites.table import Published, Suite
from baichuan_omni_jax.storage import write_json

Line = Mapping[str, Any]
Report = Callable[[str], None]
Rule = Literal["rules", "exact", "none"]
COLUMNS = ("", "items", "score %", "95 % interval", "of 10", "report", "invalid", "left out")


@dataclass(frozen=True)
class Measure:
    """A mean, or a rate, over `items` of a suite, and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float
    items: int


def measure(got: Sequence[float | int], of: Sequence[float | int] | None = None, scale: float = 1.0) -> Measure:
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


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How free answers are judged.

    Attributes:
        judge: "rules": right is what holds a reference; "exact": what is one; "none": answers only; or a model.
        rubrics: of a model, by group.
        heard: by number of line, what is judged in place of an answer's text: of spoken ones what a recognizer hears.
            None: their text.
    """

    judge: CachedJudge | Rule = "rules"
    rubrics: Mapping[str, Rubric] = field(default_factory=lambda: RUBRICS)
    heard: Mapping[int, str] | None = None

    def text(self, line: Line) -> str | None:
        """What is judged of a line; None where no recognizer could hear it."""
        return line["text"] if self.heard is None else self.heard.get(line["line"])


def score_suite(
    name: str,
    suite: Suite,
    items: Sequence[tuple[int, Item]],
    lines: Sequence[Line],
    judging: Judging,
    report: Report = lambda line: None,
) -> SuiteScores:
    """Scores raw answers.

    Args:
        name: the suite's.
        suite: what says how.
        items: with their numbers.
        lines: the answers, of those items that have one.
        judging: how free answers are judged, and what is judged of spoken ones.
        report: gets lines of progress.

    Returns:
        The scores of all and of each group. Items without an answer, or whose answer no judge gave a verdict on, are
        left out and counted by why.
    """
    scores, notes = item_scores(suite, items, lines, judging, report)
    # Settings are those of all lines, and speech where one was spoken.
    spoken = suite.task == "chat" and any(line.get("settings", {}).get("speech") for line in lines)
    return SuiteScores(
        suite=name,
        title=suite.title + (", spoken answers" if spoken else ""),
        groups=score_groups([scores[number] for number, _ in items], suite.average),
        published=suite.spoken if spoken else suite.published,
        rates=suite.scorer == "errors",
        of_ten=suite.scorer == "judge",
        notes=notes,
    )


def item_scores(
    suite: Suite,
    items: Sequence[tuple[int, Item]],
    lines: Sequence[Line],
    judging: Judging,
    report: Report = lambda line: None,
) -> tuple[dict[int, ItemScore], list[str]]:
    """Scores each item by its number; returns also sentences about how, and what went wrong."""
    answers = {line["line"]: line for line in lines}
    scores, cases, notes = dict[int, ItemScore](), list[Case](), list[str]()
    for number, item in items:
        # Left out of the score: what was not asked, not answered, or not heard.
        line = answers.get(number, {"cause": "no_answer"})
        text = judging.text(line) if "cause" not in line else None
        if text is None:
            scores[number] = ItemScore(item.group, problem=line.get("cause", "recognizer_failed"))
        # What a rule tells: an answer that is none counts as wrong, as it would in an exam.
        elif suite.scorer == "letter":
            letter = text if suite.task == "choose" else choice_letter(text, item.options)
            scores[number] = ItemScore(item.group, float(letter in item.references), invalid=letter is None)
        elif suite.scorer == "errors":
            edits, units = count_errors(text, item.references[0], item.language)
            scores[number] = ItemScore(item.group, edits, units, invalid=not text.strip())
        # What a judge tells is asked for together, below.
        elif isinstance(judging.judge, CachedJudge):
            cases.append(Case(item.id, judging.rubrics[item.group], item.question, item.references, text))
        elif judging.judge == "none" or not item.references or judging.rubrics[item.group].form == "points":
            # Nothing that a rule could tell: a rating, or a chain of thought.
            scores[number] = ItemScore(item.group, problem="not_scored")
        else:
            match = exact_match if judging.judge == "exact" else contains_match
            right = match(text, item.references)
            scores[number] = ItemScore(item.group, float(right), invalid=not text.strip())
    if suite.scorer == "judge":
        notes.append(_judged_by(judging))
    # A verdict that is missing or unreadable leaves its item out, so that a judge's failures cost no points.
    if cases and isinstance(judging.judge, CachedJudge):
        numbers = {item.id: (number, item) for number, item in items}
        for verdict in judging.judge.judge(cases, report):
            number, item = numbers[verdict.id]
            scores[number] = ItemScore(item.group, verdict.score or 0.0, problem=verdict.problem)
        notes += judging.judge.notes
    return scores, notes


def _judged_by(judging: Judging) -> str:
    if isinstance(judging.judge, CachedJudge):
        ours = all(judging.rubrics[name] is rubric for name, rubric in RUBRICS.items())
        return f"judged by {judging.judge.name}, by {'our own rubrics' if ours else 'rubrics of a file'}"
    if judging.judge == "none":
        return "answers only: no judge"
    rule = "the answer is a reference" if judging.judge == "exact" else "a reference stands in the answer"
    return f"judged by a rule: {rule}; ratings and reasoning have none (--judge URL)"


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
    # Cells of one width, for who reads it in a terminal.
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
    # As the report prints it, so that nobody has to convert: three subsets of 10, the others in percent.
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
