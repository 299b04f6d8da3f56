"""The error that a user can mend: one sentence, shown without a traceback, exit code 2."""

import sys
from collections.abc import Callable


class ConfigError(ValueError):
    """Something the user gave (a key, a path, a mesh, a checkpoint) cannot be used; the message names it."""


def exit_code(command: Callable[[], None]) -> int:
    """Runs `command`; returns 0, or 2 after printing the sentence of a ConfigError to stderr."""
    try:
        command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
