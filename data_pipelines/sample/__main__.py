"""Builds the sample data set: plan, make the media, write the manifests; complete when `sample.json` is there."""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from baichuan_omni_jax.errors import exit_code
from baichuan_omni_jax.storage.given import given_folder
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.errors import file_errors
from data_pipelines.sample.documents import HELD_OUT, RECIPES, plan_documents
from data_pipelines.sample.media import FOLDERS, MediaPlan, produce, record
from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE
from data_pipelines.tools.commands import run_command
from data_pipelines.tools.whole_folder import build_whole

VERSION = 4
"""Raised whenever the same seed would give other documents or media: an older folder is then rebuilt."""

SAMPLE_SOURCES = tuple((source, f"{source}.jsonl") for source in RECIPES)
"""(name, manifest file relative to the data set's root) of every source."""

HELD_OUT_SOURCES = tuple((f"held_out/{name}", f"held_out/{name}.jsonl") for name in HELD_OUT)
"""The same of every ability's held-out documents."""

SUMMARY = "sample.json"
_OWN_NAMES = frozenset({"held_out", *FOLDERS, *(manifest for _, manifest in SAMPLE_SOURCES)})


def build_sample(out: str | Path, *, seed: int = 0, progress: bool = True) -> Path:
    """Builds the data set at `out` (or finds it there, complete and of this seed) and returns the folder.

    `out` is either complete or untouched. Raises ConfigError when it holds anything that is not sample data, or when a
    wheel of the `sample` extra is missing.
    """

    def fill(folder: Path) -> dict:
        # Everything is planned before anything is made: documents decide which media there are.
        for name in (*FOLDERS, "held_out"):
            (folder / name).mkdir()
        plan, manifests = plan_documents(seed)
        seconds = _produce_all(plan, folder, progress)
        for source, manifest in (*SAMPLE_SOURCES, *HELD_OUT_SOURCES):
            lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in manifests[source]]
            (folder / manifest).write_text("".join(lines), encoding="utf-8")
        return _summarize(plan, manifests, seconds)

    identity = {"version": VERSION, "seed": seed}
    return build_whole(out, SUMMARY, identity, fill, own_names=_OWN_NAMES, kind="sample data")


def _produce_all(plan: MediaPlan, root: Path, progress: bool) -> float:
    """Makes every planned file; returns the seconds of audio."""
    # Speech first: videos last as long as their tracks.
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


def _summarize(plan: MediaPlan, manifests: dict[str, list[dict]], seconds: float) -> dict:
    training = {source: documents for source, documents in manifests.items() if source in RECIPES}
    documents = [document for source in training.values() for document in source]
    return {
        "documents": len(documents),
        "by_source": {source: len(entries) for source, entries in training.items()},
        "held_out": {source: len(manifests[source]) for source in manifests if source not in training},
        "by_type": dict(sorted(Counter(document["type"] for document in documents).items())),
        "images": len(plan.images),
        "speech_clips": len(plan.speech),
        "videos": len(plan.videos),
        "audio_seconds": round(seconds, 1),
        "text_characters": sum(len(plain_text(document["text"])) for document in documents),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "out", metavar="OUT", type=given_folder, help="a new or empty folder, or an earlier sample data set"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other documents (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 with one sentence when the folder or the installation cannot be used."""
    return exit_code(lambda: _build(arguments.out, arguments.seed))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("sample", __doc__, add_arguments, run, arguments)


def _build(folder: Path, seed: int) -> None:
    begin = time.perf_counter()
    with file_errors(folder):
        out = build_sample(folder, seed=seed)
    summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    print(f"{out}: {summary['documents']} documents ({time.perf_counter() - begin:.1f} s)")
    for kind, count in summary["by_type"].items():
        print(f"  {kind:<18}{count:>5}")
    held_out = ", ".join(f"{count} {source.removeprefix('held_out/')}" for source, count in summary["held_out"].items())
    print(f"  held out: {held_out}")
    print(
        f"  {summary['images']} images, {summary['speech_clips']} speech clips, {summary['videos']} videos, "
        f"{summary['audio_seconds']:.0f} s of audio, {summary['text_characters']} characters of text"
    )


if __name__ == "__main__":
    sys.exit(main())
