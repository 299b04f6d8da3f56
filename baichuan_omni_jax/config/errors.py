"""The errors that end a command with one sentence and without a traceback."""

import sys
from collections.abc import Callable


class ConfigError(ValueError):
    """Something the user gave (a key, a path, a mesh, a checkpoint) cannot be used; the message names it."""


class RunStoppedError(RuntimeError):
    """A run ended itself before its last step, as starting it again might not help. The message says why."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`; returns 0, or prints the sentence of its error to stderr: 2 ConfigError, 3 RunStoppedError."""
    try:
        command()
    except (ConfigError, RunStoppedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3
    return 0
