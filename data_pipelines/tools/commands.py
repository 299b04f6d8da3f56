"""What the commands have in common: where media lie, what was skipped and why, files that cannot be read or written."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError, exit_code
from data_pipelines.errors import file_errors


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


def skipped_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where, cause, message) of each line of a file of skipped documents."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield values["where"], values["cause"], values["message"]
