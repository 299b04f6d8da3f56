"""Builds the sample data set: plan, make the media, write the manifests; complete when `sample.json` is there."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.sample.documents import RECIPES, plan_documents
from data_pipelines.sample.media_plan import FOLDERS, MediaPlan, produce, record
from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE

VERSION = 3
"""Raised whenever the same seed would give other documents or media: an older folder is then rebuilt."""

SAMPLE_SOURCES = tuple((source, f"{source}.jsonl") for source in RECIPES)
"""(name, manifest file relative to the data set's root) of every source."""

SUMMARY = "sample.json"
_OWN_NAMES = {".cache", SUMMARY, *FOLDERS, *(manifest for _, manifest in SAMPLE_SOURCES)}


def build_sample(out: str | Path, *, seed: int = 0, progress: bool = True) -> Path:
    """Builds the data set at `out` (or finds it there, complete and of this seed) and returns the folder.

    Everything is made in `OUT.partial` and renamed at the end, so `out` is either complete or untouched. Raises
    ConfigError when `out` holds anything that is not sample data, or when a wheel of the `sample` extra is missing.
    """
    out = Path(out).expanduser().resolve()
    if _read_summary(out) == (VERSION, seed):
        return out
    _refuse_foreign(out)
    partial = out.with_name(out.name + ".partial")
    _refuse_foreign(partial)
    out.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    for folder in FOLDERS:
        (partial / folder).mkdir(parents=True)
    plan, manifests = plan_documents(seed)
    seconds = _produce_all(plan, partial, progress)
    for source, manifest in SAMPLE_SOURCES:
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in manifests[source]]
        (partial / manifest).write_text("".join(lines), encoding="utf-8")
    summary = _summarize(plan, manifests, seconds, seed)
    (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return out


def _read_summary(out: Path) -> tuple[int, int] | None:
    """(version, seed) of a complete data set, None when there is none."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        return summary["version"], summary["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, so the sample data cannot be built there")
    foreign = sorted({entry.name for entry in folder.iterdir()} - _OWN_NAMES) if folder.exists() else []
    if foreign:
        raise ConfigError(
            f"{folder} is not empty and holds {foreign[0]!r}, which is no sample data: "
            "name a new or empty folder; nothing was changed"
        )


def _produce_all(plan: MediaPlan, root: Path, progress: bool) -> float:
    """Makes every planned file; returns the seconds of sound."""
    recordings = record(plan)
    paths = [clip.path for clip in plan.videos] + list(plan.speech) + list(plan.images)
    # Threads, not processes: the encoders release the interpreter lock, and the caller may be a JAX program that must
    # neither be forked nor imported again.
    with ThreadPoolExecutor(max_workers=2) as pool:
        made = pool.map(lambda path: produce(plan, recordings, path, root), paths)
        console = Console(stderr=True)
        for _ in track(made, "sample data", len(paths), console=console, disable=not progress, transient=True):
            pass
    return sum(map(len, recordings.values())) / SAMPLE_RATE


def _summarize(plan: MediaPlan, manifests: dict[str, list[dict]], seconds: float, seed: int) -> dict:
    documents = [document for source in manifests.values() for document in source]
    return {
        "version": VERSION,
        "seed": seed,
        "documents": len(documents),
        "by_source": {source: len(entries) for source, entries in manifests.items()},
        "by_type": dict(sorted(Counter(document["type"] for document in documents).items())),
        "images": len(plan.images),
        "speech_clips": len(plan.speech),
        "videos": len(plan.videos),
        "audio_seconds": round(seconds, 1),
        "text_characters": sum(len(plain_text(document["text"])) for document in documents),
    }
