"""What a chain of stages teaches and what it loses: every ability after every stage, beside chance.

    WORKDIR/retention.md, retention.json     written by `baichuan-omni stages` when its last stage is finished

A stage's abilities are those of its last measured step (`abilities.json` in its workdir).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.evaluation.chain_record import number
from baichuan_omni_jax.storage import atomic_write, write_json

ABILITIES = "abilities.json"
TABLE = "retention"


@dataclass(frozen=True)
class StageAbilities:
    """The abilities after one stage, by name: what `AbilityScore.as_json` gives. `step` is where they were measured."""

    stage: str
    step: int
    scores: Mapping[str, Mapping[str, Any]]


def read_stage(stage: str, workdir: Path) -> StageAbilities | None:
    """Reads what a stage's workdir says of its abilities; None where it says nothing."""
    try:
        steps = json.loads((workdir / ABILITIES).read_text(encoding="utf-8"))["steps"]
        last = max(steps, key=int)
        scores = {name: score for name, score in steps[last].items() if _is_score(score)}
        return StageAbilities(stage, int(last), scores)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_score(found: Any) -> bool:
    """Whether it has all that the table shows: a file may be of another version, or edited."""
    if not isinstance(found, dict) or not isinstance(found.get("beyond_chance"), bool):
        return False
    gain = found.get("media_gain")
    numbers = [found.get(key) for key in (_measure(found), "chance", "items")] + ([] if gain is None else [gain])
    return all(number(value) is not None for value in numbers)


def retention_json(stages: Sequence[StageAbilities]) -> dict[str, Any]:
    """Lists for each ability its score after every stage, the difference to the stage before, and chance."""
    found: dict[str, Any] = {}
    for name in _names(stages):
        rows, before = [], None
        for stage in stages:
            score = stage.scores.get(name)
            if score is None:
                continue
            value = score[_measure(score)]
            difference = None if before is None else value - before
            gain = score.get("media_gain")
            rows.append(
                {"stage": stage.stage, "step": stage.step, _measure(score): value, "difference": difference}
                | {"chance": score["chance"], "items": score["items"], "beyond_chance": score["beyond_chance"]}
                | ({} if gain is None else {"media_gain": gain})
            )
            before = value
        found[name] = rows
    return {"stages": [stage.stage for stage in stages], "abilities": found}


def retention_table(stages: Sequence[StageAbilities]) -> str:
    """Draws the scores in percent as a table in Markdown: a row an ability, a column a stage.

    A cell has the score, the difference to the stage before in points, and a star where the score is beyond chance.
    Less is better of cer.
    """
    rows = [["", "chance", *(stage.stage for stage in stages)]]
    for name, measured in retention_json(stages)["abilities"].items():
        by_stage = {row["stage"]: row for row in measured}
        cells = [_cell(by_stage.get(stage.stage)) for stage in stages]
        rows.append([f"{name}, {_measure(measured[-1])}", f"{100 * measured[-1]['chance']:.0f} %", *cells])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    legend = "Percent, and points more or less than after the stage before; * beyond chance; of cer less is better."
    return "\n".join([*lines, "", legend])


def write_retention(folder: Path, stages: Sequence[StageAbilities]) -> str:
    """Writes the table as Markdown and JSON into `folder`; returns the Markdown."""
    table = retention_table(stages)
    with atomic_write(folder / f"{TABLE}.md") as file:
        file.write(table + "\n")
    write_json(folder / f"{TABLE}.json", retention_json(stages))
    return table


def _names(stages: Sequence[StageAbilities]) -> list[str]:
    return list(dict.fromkeys(name for stage in stages for name in stage.scores))


def _measure(score: Mapping[str, Any]) -> str:
    return "accuracy" if "accuracy" in score else "cer"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    difference = "" if row["difference"] is None else f" ({100 * row['difference']:+.0f})"
    return f"{100 * row[_measure(row)]:.0f}{difference}{' *' if row['beyond_chance'] else ''}"
