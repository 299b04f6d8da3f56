"""The folder of a chain of runs as training would have left it, with made-up numbers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

STEPS = 100


def write_lines(path: Path, records: list[dict[str, Any]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step_record(step: int, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: a loss that falls by steps, half of it text."""
    loss = 4 * math.exp(-step / 40)
    parts = {"loss_text": loss / 2, "loss_audio": loss / 2, "loss_audio_q0": loss}
    return {"step": step, "loss": loss, **parts, "step_time_s": 0.5, "tokens": 100, **more}


def ability(name: str, score: float, measure: str = "accuracy") -> dict[str, float]:
    """The keys of one ability in a line of metrics.jsonl."""
    return {f"ability/{name}/{measure}": score, f"ability/{name}/chance": 0.25, f"ability/{name}/items": 64}


def write_stage(folder: Path, until: int = STEPS, abilities: Mapping[str, tuple[str, float]] | None = None) -> None:
    """Metrics of a stage up to a step; the abilities grow to what is given, measured four times."""
    records = []
    for step in range(1, until + 1):
        more = {}
        if step % (STEPS // 4) == 0:
            more["eval/held_out/loss"] = 5 * math.exp(-step / 40)
            for name, (measure, score) in (abilities or {}).items():
                reached = score * step / STEPS if measure == "accuracy" else 1 - (1 - score) * step / STEPS
                more |= ability(name, reached, measure)
        records.append(step_record(step, **more))
    write_lines(folder / "metrics.jsonl", records)


def write_chain(folder: Path, stages: Mapping[str, int], recipe: str = "small") -> None:
    entries = [{"name": name, "steps": steps, "wall_s": 60.0, "cpu_s": 90.0} for name, steps in stages.items()]
    facts = {"machine": {"processor": "a <fast> one"}, "versions": {"jax": "0.10.2"}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chain.json").write_text(json.dumps({"recipe": recipe, "stages": entries, **facts}))


def write_media(folder: Path) -> tuple[Path, Path]:
    """A picture and a second of sound."""
    picture, sound = folder / "picture.png", folder / "sound.wav"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[10:40, 20:50] = (220, 30, 40)
    Image.fromarray(pixels).save(picture)
    soundfile.write(sound, 0.3 * np.sin(np.arange(16000) / 10), 16000)
    return picture, sound
