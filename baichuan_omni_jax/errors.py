"""The errors that end a command, or one request, with one sentence and without a traceback."""

import gc
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags


class ConfigError(ValueError):
    """Something the user gave (a key, a path, a mesh, a checkpoint) cannot be used; the message names it."""


class RequestError(ValueError):
    """One request cannot be served; the message says why in one sentence. The engine and other requests go on.

    `cause` is the word it is counted under: `too_long`, `no_branch`, `bad_media`, `bad_message`, and `failed`:
    the engine itself could not go on with it.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class RunStoppedError(RuntimeError):
    """A run ended itself before its last step, as starting it again might not help. The message says why."""


def check_folders(options: object, *names: str) -> None:
    """Before minutes of work: raises ConfigError naming the first file `options.NAME` (or None) without a folder."""
    for name in names:
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}")


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`; returns 0, or prints the sentence of its error to stderr: 2 ConfigError, 3 RunStoppedError."""
    try:
        command()
    except (ConfigError, RunStoppedError) as error:
        sentence, code = str(error), 2 if isinstance(error, ConfigError) else 3
    else:
        return 0
    # What the error kept alive may complain when it goes (asyncio does): the sentence is the last line.
    gc.collect()
    print(f"error: {sentence}", file=sys.stderr)
    return code


def run_command(main: Callable[[list[str]], None], *, files: bool = False) -> None:
    """Parses absl's flags and runs `main` with the program's name and what is no flag, of which there is none unless
    `files`. A command line that cannot be used ends in one sentence and exit code 2, where absl would say 1.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        rest: list[str] = []
        if code := exit_code(lambda: rest.extend(_parsed(arguments, files))):
            sys.exit(code)
        return rest

    app.run(main, flags_parser=parse)


def _parsed(arguments: Sequence[str], files: bool) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"there is no flag --{error.flagname} (see --help)") from error
    except flags.Error as error:
        missing = re.match(r"flag --(\w+)=None: ", str(error))
        raise ConfigError(f"--{missing[1]} must be given" if missing else str(error).rstrip(".")) from error
    # Without `--set` before it an override would be passed over in silence, and the run be another one.
    if rest[1:] and not files:
        told = f": write --set {rest[1]}" if "=" in rest[1] else " (see --help)"
        raise ConfigError(f"{rest[1]!r} belongs to no flag{told}")
    return rest
