"""Builds a data set from manifests: shards of documents with their media inside.

What cannot be used is skipped, counted by cause and named in DIR/skipped.jsonl. A build that was stopped goes on where
it was when the same command is given again, and one whose manifests or media changed builds the shards that changed.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.build import SKIPPED_FILE, build_dataset
from data_pipelines.errors import describe_causes, first_of_causes
from data_pipelines.tokenizers.tokenizer import AUDIOTEXT_START
from data_pipelines.tools.commands import (
    add_media_arguments,
    add_runner_arguments,
    run_command,
    run_job_command,
    runner_from_options,
    skipped_lines,
    trusted_from_options,
)

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def _build(options: argparse.Namespace) -> None:
    size = _bytes(options.shard_bytes)
    runner = runner_from_options(options)
    manifests, trusted = options.manifests, trusted_from_options(options)
    dataset = build_dataset(manifests, options.out, options.root, options.shard_documents, size, runner, trusted)
    for line in describe(dataset):
        print(line)
    # What was skipped, by cause with one example; all of it is in a file.
    causes = []
    if skipped := dataset["skipped"]:
        path = options.out / SKIPPED_FILE
        causes = describe_causes(skipped, first_of_causes(skipped_lines(path), skipped))
        for line in causes:
            print(f"  {line}")
        print(f"each of them, with its cause: {path}")
    if not dataset["documents"]:
        names = ", ".join(dataset["manifests"])
        raise ConfigError(
            f"no document of {names} can be used: {'; '.join(causes)}" if causes else f"{names}: no document"
        )


def describe(dataset: Mapping) -> list[str]:
    """Describes what a `dataset.json` holds, in lines."""
    size = sum(shard["bytes"] for shard in dataset["shards"])
    lines = [
        f"{dataset['documents']} documents in {len(dataset['shards'])} shards, {size / 2**20:.1f} MiB: "
        f"{dataset['pictures']} images ({dataset['pixels'] / 1e6:.1f} megapixels), "
        f"{dataset['videos']} videos ({dataset['video_hours']:.2f} h), "
        f"{dataset['sounds']} audio clips ({dataset['audio_hours']:.2f} h), {dataset['characters']} characters"
    ]
    lines += [f"  {name or '(no type)':<20}{sums['documents']:>10}" for name, sums in dataset["types"].items()]
    if unknown := dataset["unknown_types"]:
        lines.append(f"types outside the known ones: {', '.join(name or '(no type)' for name in unknown)}")
    if unmarked := dataset["unmarked_speech"]:
        what = f"{unmarked} conversations answer in speech without {AUDIOTEXT_START} before each answer"
        lines.append(f"{what} (docs/how-to/data.md)")
    if skipped := dataset["skipped"]:
        lines.append(f"{sum(skipped.values())} documents are skipped:")
    return lines


def _bytes(text: str) -> int:
    """256M -> 268435456. Raises ConfigError."""
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    if not number.isascii() or not number.isdigit():
        raise ConfigError(f"--shard-bytes {text} is no number of bytes such as 64M or 2G")
    return int(number) * _UNITS.get(unit, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("manifests", metavar="MANIFEST", type=Path, nargs="+", help="JSONL, one document a line; also .gz or .zst")
    add("--out", metavar="DIR", type=Path, required=True, help="a new or empty folder, or an earlier build")
    add_media_arguments(parser)
    add("--shard-documents", metavar="N", type=int, default=4096, help="most documents of a shard (default 4096)")
    add("--shard-bytes", metavar="SIZE", default="256M", help="size from which a shard is full (default 256M)")
    add_runner_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    return run_job_command(lambda: _build(arguments), arguments.out)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("build", __doc__, add_arguments, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
