"""Builds the sample data set and prints what it holds."""

import argparse
import json
import time
from pathlib import Path

from baichuan_omni_jax.errors import exit_code
from data_pipelines.errors import file_errors
from data_pipelines.sample.build import SUMMARY, build_sample
from data_pipelines.tools.commands import run_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("out", metavar="OUT", type=Path, help="a new or empty folder, or an earlier sample data set")
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
    print(
        f"  {summary['images']} images, {summary['speech_clips']} speech clips, {summary['videos']} videos, "
        f"{summary['audio_seconds']:.0f} s of sound, {summary['text_characters']} characters of text"
    )
