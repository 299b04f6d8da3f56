"""What the commands have in common: where media lie, what was skipped and why, files that cannot be read or written."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError, exit_code


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns OSError into a ConfigError that names the file, or `path` where the error names none."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: {error.strerror or error}") from error


def run_job_command(command: Callable[[], None], out: Path) -> int:
    """The exit code of a command that runs a job into the folder `out`: as `exit_code`, and 130 after Ctrl-C."""

    def run() -> None:
        with file_errors(out):
            command()

    try:
        return exit_code(run)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        return 130


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--root` and `--trust`, which mean the same in every command that reads manifests."""
    add = parser.add_argument
    add("--root", metavar="ROOT", type=Path, help="what media paths are relative to (default: the manifest's folder)")
    add(
        "--trust",
        metavar="DIR",
        type=Path,
        action="append",
        help="a folder that links among the media may lead to; may be repeated (default: any; ROOT itself: none else)",
    )


def trusted_names(options: argparse.Namespace) -> list[Path]:
    """The folders of `--trust`, or the file system's root where none was given."""
    return options.trust or [Path("/")]


def given_root(options: argparse.Namespace) -> Path | None:
    """The folder of `--root`. Raises ConfigError where it is none."""
    if options.root is None:
        return None
    root = options.root.expanduser()
    if not root.is_dir():
        raise ConfigError(f"--root {options.root} is no folder")
    return root.absolute()


def first_of_causes(skipped: Iterable[tuple[str, str, str]], causes: Iterable[str]) -> dict[str, str]:
    """One sentence for each of the causes: of the first document that was skipped for it.

    `skipped` has (where, cause, message) of each document; it is read until every cause was met.
    """
    missing, found = set(causes), {}
    for where, cause, message in skipped:
        if not missing:
            break
        if cause in missing:
            missing.remove(cause)
            found[cause] = message if message.startswith(where) else f"{where}: {message}"
    return found


def skipped_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, cause, message) of each line of a file of skipped documents."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield values["where"], values["cause"], values["message"]


def describe_causes(causes: Mapping[str, int], examples: Mapping[str, str]) -> list[str]:
    """A line for each cause, the most frequent first, with how often it was met and one of the documents.

    >>> describe_causes({"bad_form": 2}, {"bad_form": 'm.jsonl:1 has no "text"'})
    ['2 bad_form, the first: m.jsonl:1 has no "text"']
    """
    lines = []
    for cause, count in sorted(causes.items(), key=lambda item: (-item[1], item[0])):
        example = " ".join(examples.get(cause, "").split())
        example = example if len(example) <= 400 else f"{example[:397]}..."
        lines.append(f"{count} {cause}" + (f", the first: {example}" if example else ""))
    return lines
