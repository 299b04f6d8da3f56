"""The errors that end a command, or one request, with one sentence and without a traceback."""

import gc
import sys
from collections.abc import Callable, Sequence


class ConfigError(ValueError):
    """Something the user gave (a key, a path, a mesh, a checkpoint) cannot be used; the message names it."""


class UnpreparedError(ConfigError):
    """Data that lack their index or their audio codes, and are too many to get them while all hosts of a slice wait."""


class RequestError(ValueError):
    """One request cannot be served; the message is the reason in one sentence. The engine and other requests go on.

    `cause` is the word it is counted under: `too_long`, `no_branch`, `bad_media`, `bad_message`, and `failed`:
    the engine itself could not go on with it.
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class RunStoppedError(RuntimeError):
    """A run ended itself before its last step, as starting it again might not help. The message is the reason."""


class StorageError(RuntimeError):
    """Storage refused what a run needs for longer than `data.patience`. Nothing is wrong with the data, and starting
    again may help. The message names the file and the cause.
    """


def list_some(items: Sequence[str], separator: str = "; ", most: int = 5) -> str:
    """Joins the first of what may be thousands, and says how many more there are: a sentence stays one to read.

    >>> list_some(["a", "b", "c", "d"], ", ", most=2)
    'a, b, and 2 more'
    """
    # A list that is longer by one is shown whole: "and 1 more" would take as much room.
    shown = list(items) if len(items) <= most + 1 else [*items[:most], f"and {len(items) - most} more"]
    return separator.join(shown)


def exit_code(command: Callable[[], int | None]) -> int:
    """Runs `command`; returns its code (None is 0), or prints the sentence of its error to stderr and returns its code:
    1 StorageError, 2 ConfigError, 3 RunStoppedError, 130 KeyboardInterrupt.
    """
    codes = {StorageError: 1, ConfigError: 2, RunStoppedError: 3}
    try:
        return command() or 0
    except tuple(codes) as error:
        sentence, code = f"error: {error}", next(code for kind, code in codes.items() if isinstance(error, kind))
    except KeyboardInterrupt as interrupt:
        sentence, code = str(interrupt) or "stopped", 130
    # What the error kept alive may complain when it goes (asyncio does): the sentence is the last line.
    gc.collect()
    print(sentence, file=sys.stderr)
    return code
