"""Builds the data set of the small recipe: plan, draw, write the manifests; complete when `small.json` is there."""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import track

from baichuan_omni_jax.errors import exit_code
from baichuan_omni_jax.storage.given import given_folder
from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.errors import file_errors
from data_pipelines.sample.media import encode_video
from data_pipelines.small.documents import COUNTS, HELD_OUT, SOURCES, Counts, MediaPlan, plan_documents
from data_pipelines.small.motion import FRAME_RATE
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from data_pipelines.tools.commands import run_command
from data_pipelines.tools.whole_folder import build_whole

VERSION = 2
"""Raised whenever the same seed would give other documents or media: an older folder is then rebuilt."""

SUMMARY = "small.json"
TOKENIZER = "tokenizer.json"
VOCABULARY = 1024
"""Entries of the text tokenizer, as many as the small model has."""
_OWN_NAMES = frozenset({"images", "video", "speech", TOKENIZER, HELD_OUT, *(f"{name}.jsonl" for name in SOURCES)})


def build_small(out: str | Path, *, seed: int = 0, counts: Counts = COUNTS, progress: bool = True) -> Path:
    """Builds the data set at `out` (or finds it there, complete and of this seed) and returns the folder.

    `out` is either complete or untouched. Raises ConfigError when it holds anything else, or when a wheel of the
    `sample` extra is missing.

    Args:
        out: a new or empty folder, or an earlier data set.
        seed: another one gives other documents.
        counts: how many documents there are.
        progress: whether a bar is shown.
    """
    identity = {"version": VERSION, "seed": seed, "counts": asdict(counts)}

    def fill(folder: Path) -> dict:
        plan, manifests = plan_documents(seed, counts)
        for name in ("images", "video", "speech", HELD_OUT):
            (folder / name).mkdir()
        _make_media(plan, folder, progress)
        for name, documents in manifests.items():
            lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        # One vocabulary for all stages, of all that they read: the first of them reads words alone.
        texts = (plain_text(each["text"]) for documents in manifests.values() for each in documents)
        train_tokenizer(texts, VOCABULARY).save(str(folder / TOKENIZER))
        return {
            "documents": {name: len(documents) for name, documents in manifests.items()},
            "images": len(plan.stills),
            "videos": len(plan.videos),
            "recordings": len(plan.speech.clips),
        }

    return build_whole(out, SUMMARY, identity, fill, own_names=_OWN_NAMES, kind="data of the small recipe")


def _make_media(plan: MediaPlan, folder: Path, progress: bool) -> None:
    def make(path: str) -> None:
        if path in plan.speech.clips:
            plan.speech.clips[path].record(folder / path)
        elif path in plan.stills:
            # Hardly compressed: the files are small, and what a row waits for is their decoding.
            plan.stills[path].render().save(folder / path, compress_level=1)
        else:
            encode_video(plan.videos[path].frames(), FRAME_RATE, folder / path)

    # Recordings are most of the files, and eSpeak is a process of its own: it speaks while others draw and write.
    paths = [*plan.speech.clips, *plan.stills, *plan.videos]
    with ThreadPoolExecutor(max_workers=2) as pool:
        made = pool.map(make, paths)
        console = Console(stderr=True)
        for _ in track(made, "small data", len(paths), console=console, disable=not progress, transient=True):
            pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("out", metavar="OUT", type=given_folder, help="a new or empty folder, or an earlier data set")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other documents (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 with one sentence when the folder or the installation cannot be used."""
    return exit_code(lambda: _build(arguments.out, arguments.seed))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("small", __doc__, add_arguments, run, arguments)


def _build(folder: Path, seed: int) -> None:
    begin = time.perf_counter()
    with file_errors(folder):
        out = build_small(folder, seed=seed)
    summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    made = ", ".join(f"{summary[kind]} {kind}" for kind in ("images", "videos", "recordings"))
    print(f"{out}: {made} ({time.perf_counter() - begin:.1f} s)")
    for name, count in summary["documents"].items():
        print(f"  {name:<24}{count:>6}")


if __name__ == "__main__":
    sys.exit(main())
