"""What the commands have in common: files that cannot be read or written end them with one sentence."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from baichuan_omni_jax.config import ConfigError
from baichuan_omni_jax.config.errors import exit_code


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
