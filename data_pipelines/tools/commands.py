"""What the commands have in common: arguments, exit codes, media folders, runners, what was skipped and why."""

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.storage.given import given_input, localized
from data_pipelines.datasets.jobs.job import Runner
from data_pipelines.datasets.jobs.runners import BeamRunner, LocalRunner
from data_pipelines.errors import file_errors


def run_command(
    name: str,
    description: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs one command by itself, as `baichuan-omni data NAME` runs it.

    Args:
        name: the subcommand's word.
        description: what `--help` says first; its first line is enough.
        add_arguments: adds the command's arguments to a parser.
        run: does the work of parsed arguments and returns the exit code.
        arguments: the command line without the program's name; default: that of this process.

    Returns:
        The exit code: 0, 2 with one sentence on stderr for what cannot be used, 130 after Ctrl-C of a job.
    """
    parser = argparse.ArgumentParser(prog=f"baichuan-omni data {name}", description=description)
    add_arguments(parser)
    options = parser.parse_args(arguments)

    def localized_run() -> int:
        with localized(options):
            return run(options)

    return exit_code(localized_run)


def run_job_command(command: Callable[[], None], out: Path) -> int:
    """Runs a command whose job writes into the folder `out`; returns its exit code, 130 after Ctrl-C."""

    def run() -> None:
        try:
            with file_errors(out):
                command()
        # Finished units stay: a job goes on from them.
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: the same command goes on from here") from None

    return exit_code(run)


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--root` and `--trust`, which mean the same in every command that reads manifests."""
    add = parser.add_argument
    add(
        "--root",
        metavar="ROOT",
        type=given_input,
        help="what media paths are relative to (default: the manifest's folder)",
    )
    add(
        "--trust",
        metavar="DIR",
        type=Path,
        action="append",
        help="a folder that links among the media may lead to; may be repeated (default: any; ROOT itself: none else)",
    )


def trusted_from_options(options: argparse.Namespace) -> list[Path]:
    """Returns the folders of `--trust`, or the file system's root where none was given."""
    # Whoever runs a command may read what they can read; servers of strangers name their folders.
    return options.trust or [Path("/")]


def root_from_options(options: argparse.Namespace) -> Path | None:
    """Returns the folder of `--root`. Raises ConfigError where it is none."""
    if options.root is None:
        return None
    root = options.root.expanduser()
    if not root.is_dir():
        raise ConfigError(f"--root {options.root} is no folder")
    return root.absolute()


def skipped_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (where, cause, message) of each line of a file of skipped documents."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            yield values["where"], values["cause"], values["message"]


RUNNERS = ("local", "beam")


def make_runner(name: str, workers: int, beam_arguments: Sequence[str] = ()) -> Runner:
    """Makes the runner called `name`, with `workers` processes (0: in this one); `beam_arguments` are Beam's own
    options.

    Raises ConfigError for an unknown name, for fewer than 0 workers, and when Apache Beam is chosen and missing.
    """
    # All that is wrong with a runner is told before a job begins.
    if workers < 0:
        raise ConfigError(f"--workers {workers} must be at least 0")
    if name == "local":
        if beam_arguments:
            raise ConfigError("--beam-args need --runner beam")
        return LocalRunner(workers)
    if name == "beam":
        return BeamRunner(workers, beam_arguments)
    raise ConfigError(f"unknown runner {name!r}: {' or '.join(RUNNERS)}")


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--runner`, `--workers` and `--beam-args`; `runner_from_options` makes a runner of what was given."""
    add = parser.add_argument
    add("--runner", choices=RUNNERS, default="local", help="processes of this machine (default) or Apache Beam")
    cores = os.cpu_count() or 1
    add("--workers", type=int, default=cores, metavar="N", help=f"processes (default {cores}, one for each core)")
    add("--beam-args", default="", metavar="OPTIONS", help="Beam's own, as in --beam-args='--runner=FlinkRunner'")


def runner_from_options(options: argparse.Namespace) -> Runner:
    """Returns the runner that parsed arguments ask for. Raises ConfigError as `make_runner`, and where workers of other
    machines would write to a URL.
    """
    if "--runner" in options.beam_args and getattr(options, "written_by_url", []):
        raise ConfigError(
            f"--out {options.written_by_url[0]}: what is written there is written on this machine first, which Beam's "
            "workers on others do not see: name a folder that all of them have"
        )
    return make_runner(options.runner, options.workers, shlex.split(options.beam_args))


@lru_cache(maxsize=8)
def load_hook(option: str, name: str, *methods: str) -> Any:
    """Loads what the factory called `name` returns, made once a process; `option` names where it was given.

    Raises ConfigError when there is none, or when what it returns lacks one of `methods`.
    """
    # Loaded and made once a process: a recognizer takes seconds to load.
    make = load_function(option, name, "factory")
    try:
        hook = make()
    except Exception as error:  # the user's program may raise anything
        raise _not_loaded(option, name, error) from error
    for method in methods:
        if not callable(getattr(hook, method, None)):
            raise ConfigError(f"{option} {name}: what it returns has no method {method}")
    return hook


def load_function(option: str, name: str, word: str = "function") -> Callable:
    """Loads what is called `name`, `package.module:function`. Raises ConfigError when there is none; it is called
    `word`.
    """
    # The form first: importing a name without a colon would raise something less helpful.
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise ConfigError(f"{option} {name}: not of the form package.module:{word}")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # as above: importing runs it
        raise _not_loaded(option, name, error) from error


def _not_loaded(option: str, name: str, error: Exception) -> ConfigError:
    kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
    return ConfigError(f"{option} {name} cannot be loaded: {kind}{error}")
