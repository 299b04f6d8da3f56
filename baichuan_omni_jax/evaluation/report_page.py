"""One page about a chain of runs: WORKDIR/report.html, whole in itself, of a finished chain or one at work.

Abilities beside chance and targets, how they came and what was lost of them, questions with their pictures, sounds and
answers, curves, times, machine and versions. Everything that stands in files is escaped; nothing is fetched.
"""

import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from baichuan_omni_jax.config.recipes import RECIPES, Target
from baichuan_omni_jax.errors import RunStoppedError
from baichuan_omni_jax.evaluation.chain_record import (
    EVALUATION,
    METRICS,
    ChainRecord,
    Score,
    StageRecord,
    ability_scores,
    number,
    read_chain,
    read_metrics,
    read_scores,
)
from baichuan_omni_jax.evaluation.report_figures import Axes, Point, line_chart, loss_curves, media_tag, span
from baichuan_omni_jax.evaluation.samples import SAMPLES, Sample, read_samples
from baichuan_omni_jax.storage import atomic_write

REPORT = "report.html"
CSS = Path(__file__).with_name("report_page.css")
_EACH = 2  # samples of an ability that are right, and as many that are not


@dataclass(frozen=True)
class Stage:
    """One stage with all that its workdir says."""

    record: StageRecord
    title: str
    records: Sequence[Mapping]
    scores: Mapping[str, Score]

    @property
    def step(self) -> int:
        """The last step that its metrics tell of."""
        return max((record["step"] for record in self.records), default=0)


@dataclass(frozen=True)
class Report:
    """What the page is made of."""

    folder: Path
    name: str
    chain: ChainRecord
    stages: Sequence[Stage]
    targets: Mapping[str, Sequence[Target]]
    final: Mapping[str, Score]  # of the evaluation, else of the last stage that measured any
    samples: Sequence[Sample]


def write_report(folder: Path, name: str = "") -> Path:
    """Writes the page of a chain's folder and returns its path. Raises RunStoppedError where it cannot be written.

    `name` is what the chain is called, where the folder is only a copy of its own.
    """
    path = folder / REPORT
    page = render(collect(folder, name))
    try:
        with atomic_write(path) as file:
            # Names in files of others may hold half a character, which no file takes.
            file.write(page.encode("utf-8", "replace").decode("utf-8"))
    except OSError as error:
        raise RunStoppedError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def collect(folder: Path, name: str = "") -> Report:
    """Reads what is there; of a folder without any run all is empty. `name`: as in `write_report`."""
    chain, stages, name = read_chain(folder), [], name or folder.resolve().name
    for record in chain.stages:
        home = folder / record.name
        records = read_metrics(home / METRICS)
        stages.append(Stage(record, record.name or name, records, read_scores(home, records)))
    # An evaluation of its own asks more than a stage does after its last step.
    evaluated = read_scores(folder / EVALUATION, [])
    measured = [evaluated, *(stage.scores for stage in reversed(stages))]
    homes = [folder / EVALUATION, *(folder / stage.record.name for stage in reversed(stages))]
    return Report(
        folder=folder,
        name=name,
        chain=chain,
        stages=stages,
        targets=RECIPES[chain.recipe].targets if chain.recipe in RECIPES else {},
        final=next((scores for scores in measured if scores), {}),
        samples=next((found for home in homes if (found := read_samples(home / SAMPLES))), []),
    )


def render(report: Report) -> str:
    """Returns the page as HTML."""
    name = report.chain.recipe or report.name
    sections = [
        _head(report, name),
        _abilities(report),
        _ability_curves(report),
        _retention(report),
        _samples(report),
        _loss_curves(report),
        _times(report),
        _machine(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: report</title><style>{CSS.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def target_value(report: Report, ability: str, target: Target) -> float | None:
    """Returns what a target is about, as it was measured; None where it was not."""
    score = report.final.get(ability)
    if score is None:
        return None
    if target.measure == "media_gain":
        return score.media_gain
    if target.measure == "lost":
        before = next((stage.scores.get(ability) for stage in report.stages if stage.title == target.since), None)
        return None if before is None else _lost(before, score)
    return score.score if score.measure == target.measure else None


def _lost(before: Score, after: Score) -> float:
    worse = before.score - after.score
    return worse if after.measure == "accuracy" else -worse


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _head(report: Report, name: str) -> str:
    trained = [stage for stage in report.stages if stage.records]
    done = sum(stage.step >= stage.record.steps > 0 for stage in trained)
    runs = len([stage for stage in report.stages if stage.records or stage.record.steps > 1])
    wall = sum(stage.record.wall for stage in report.stages)
    text = (
        f"{done} of {runs} training runs finished, {wall / 60:.0f} minutes so far." if runs else "No run is here yet."
    )
    when = time.strftime("%Y-%m-%d %H:%M")
    return f"<h1>{escape(name)}</h1><p>{escape(text)} Drawn {when} from <code>{escape(str(report.folder))}</code>.</p>"


def _abilities(report: Report) -> str:
    if not report.final and not report.targets:
        return ""
    rows = []
    for ability in dict.fromkeys([*report.final, *report.targets]):
        score = report.final.get(ability)
        targets = [
            _verdict(target, target_value(report, ability, target)) for target in report.targets.get(ability, ())
        ]
        cells = [escape(ability), '<span class="quiet">not measured</span>', "<br>".join(targets)]
        if score is not None:
            cells[1] = f"{score.measure} {_percent(score.score)}"
            known = score.low is not None and score.high is not None
            cells.append(f"{_percent(score.low)} to {_percent(score.high)}" if known else "")
            cells += [_percent(score.chance), _number(score.media_gain, "+.2f"), _number(score.items, ".0f")]
        rows.append(cells + [""] * (7 - len(cells)))
    head = ("ability", "score", "target", "95 % of resampled", "chance", "media gain", "items")
    text = (
        "Held-out questions: new combinations and new voices. Of accuracy more is better, of cer (edits a character) "
        "less. Chance is what is reached without picture or sound; the media gain is what the own ones save of the "
        "loss beside another question's, in nats a target."
    )
    return f"<h2>What it can do</h2><p>{text}</p>{_table(head, rows)}"


def _verdict(target: Target, value: float | None) -> str:
    """A target in words, with whether it is met."""
    words = {
        "accuracy": f"at least {100 * target.bound:.0f} %",
        "cer": f"at most {100 * target.bound:.0f} %",
        "media_gain": f"gain at least {target.bound:.1f}",
        "lost": f"at most {100 * target.bound:.0f} points lost",
    }[target.measure]
    if value is None:
        return f'<span class="quiet">{words} (not measured)</span>'
    kind, said = ("good", "✓ met") if target.is_met(value) else ("bad", "✗ missed")
    return f'{words} <span class="{kind}">{said}</span>'


def _ability_curves(report: Report) -> str:
    """Small figures of one axis: every ability over the steps of all stages."""
    curves: dict[tuple[str, str], list[Point]] = {}
    chances: dict[str, float] = {}
    asked: set[float] = set()  # questions of a point
    marks, before = [], 0
    for stage in report.stages:
        if not stage.records:
            continue
        marks.append((float(before), stage.title))
        for record in stage.records:
            for name, (measure, score) in ability_scores(record).items():
                curves.setdefault((name, measure), []).append((float(before + record["step"]), score))
                if (chance := number(record.get(f"ability/{name}/chance"))) is not None:
                    chances[name] = chance
                if (items := number(record.get(f"ability/{name}/items"))) is not None:
                    asked.add(items)
        before += stage.step
    if not curves:
        return ""
    charts = []
    for (name, measure), points in curves.items():
        levels = {"chance": chances[name]} if name in chances else {}
        bounds = [target.bound for target in report.targets.get(name, ()) if target.measure == measure]
        levels |= {"target": bounds[0]} if bounds else {}
        top = 1.0 if measure == "accuracy" else max(1.0, *(y for _, y in points))
        axes = Axes((0.0, float(max(before, 1))), (0.0, top), percent=True, marks=marks)
        charts.append(line_chart(f"{name}, {measure}", {name: points}, axes, levels))
    text = "Over the steps of all stages; a line across marks where the next one begins."
    final = {score.items for score in report.final.values() if score.items is not None}
    if asked and final and asked != final:
        text += f" A point is of {_range(asked)} questions, a score above of {_range(final)}."
    return f'<h2>How it came</h2><p>{text}</p><div class="cards">{"".join(charts)}</div>'


def _range(counts: Collection[float]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _retention(report: Report) -> str:
    stages = [stage for stage in report.stages if stage.scores]
    if not stages:
        return ""
    rows = []
    for name in dict.fromkeys(name for stage in stages for name in stage.scores):
        cells, before = [], None
        for stage in stages:
            score = stage.scores.get(name)
            cells.append("–" if score is None else _percent(score.score) + _change(before, score))
            before = score or before
        measure = next(stage.scores[name].measure for stage in stages if name in stage.scores)
        rows.append([f"{escape(name)}, {measure}", *cells])
    text = "Every ability after each stage that measured it, and points better (+) or worse (−) than before."
    return f"<h2>What stays</h2><p>{text}</p>{_table(['', *(stage.title for stage in stages)], rows)}"


def _change(before: Score | None, after: Score) -> str:
    if before is None:
        return ""
    points = -100 * _lost(before, after)
    kind = "quiet" if abs(points) < 2 else "good" if points > 0 else "bad"
    return f' <span class="{kind}">{points:+.0f}</span>'.replace(">-", ">−")


def _samples(report: Report) -> str:
    """A few questions of each ability, some of them answered wrong where there are any."""
    by_ability: dict[str, list[Sample]] = {}
    for sample in report.samples:
        by_ability.setdefault(sample.ability, []).append(sample)
    parts = []
    for ability, samples in by_ability.items():
        # The same ones every time the page is drawn.
        samples = random.Random(ability).sample(samples, len(samples))
        wrong = [sample for sample in samples if sample.right is False]
        others = [sample for sample in samples if sample.right is not False]
        shown = [*others[: 2 * _EACH - min(len(wrong), _EACH)], *wrong[:_EACH]]
        parts.append(f'<h3>{escape(ability)}</h3><div class="cards samples">{"".join(map(_card, shown))}</div>')
    text = "Chosen at random among the right ones and the wrong ones."
    return f"<h2>Asked and answered</h2><p>{text}</p>{''.join(parts)}" if parts else ""


def _card(sample: Sample) -> str:
    media = "".join(media_tag(kind, Path(path)) for kind, path in sample.media)
    recording, speech = (media_tag("audio", Path(p)) if p else "" for p in (sample.recording, sample.speech))
    verdict = {True: '<span class="good">✓ right</span>', False: '<span class="bad">✗ wrong</span>', None: ""}
    answered = f"{escape(sample.answer) or '–'} {verdict[sample.right]}{speech}"
    entries = [
        ("asked", escape(sample.prompt)),
        ("expected", escape(sample.reference) + recording),
        ("heard in its answer" if speech else "answered", answered),
    ]
    lines = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in entries if value)
    return f'<div class="card">{media}<dl>{lines}</dl></div>'


def _loss_curves(report: Report) -> str:
    charts = []
    for stage in report.stages:
        curves = loss_curves(stage.records)
        if curves:
            x, y = span(curves)
            charts.append(line_chart(stage.title, curves, Axes(x, y)))
    text = "Parts of the loss over the steps of each stage, in training and held out."
    return f'<h2>Loss</h2><p>{text}</p><div class="cards">{"".join(charts)}</div>' if charts else ""


def _times(report: Report) -> str:
    rows = []
    for stage in report.stages:
        took = [found for record in stage.records if (found := number(record.get("step_time_s"))) is not None]
        losses = [found for record in stage.records if (found := number(record.get("loss"))) is not None]
        rows.append(
            [
                escape(stage.title),
                f"{stage.step}/{stage.record.steps}" if stage.records or stage.record.steps > 1 else "",
                f"{sorted(took)[len(took) // 2]:.3f}" if took else "",
                f"{losses[-1]:.3f}" if losses else "",
                f"{stage.record.wall / 60:.1f}" if stage.record.wall else "",
                f"{stage.record.cpu / 60:.1f}" if stage.record.cpu else "",
            ]
        )
    if not rows:
        return ""
    wall, cpu = (sum(getattr(stage.record, key) for stage in report.stages) for key in ("wall", "cpu"))
    rows.append(["all", "", "", "", f"{wall / 60:.1f}", f"{cpu / 60:.1f}" if cpu else ""])
    head = ("stage", "steps", "seconds a step (median)", "last loss", "minutes", "CPU minutes")
    return f"<h2>Times</h2>{_table(head, rows)}"


def _machine(report: Report) -> str:
    facts = [*report.chain.machine.items(), *report.chain.versions.items()]
    rows = [[escape(name), escape(value)] for name, value in facts]
    return f"<h2>Machine and versions</h2>{_table(('', ''), rows)}" if rows else ""
