"""The errors that end a command, or one request, with one sentence and without a traceback."""

import gc
import sys
from collections.abc import Callable


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
