"""The errors that end a command, or one request, with one sentence and without a traceback."""

import errno
import gc
import os
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


# What a file system answers, by class or number, to somebody who asked for the wrong thing;
# no waiting mends it.
_WRONG_KINDS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_WRONG = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


def storage_error(error: OSError, what: str = "") -> ConfigError | StorageError:
    """Turns what a file system or a bucket refused into the error that ends a command.

    Args:
        error: what was raised.
        what: the beginning of the sentence; "": the file that the error names.

    Returns:
        ConfigError for what is not there, not allowed or of another kind: starting again would not help. StorageError
        for the rest: a full disk, a server that does not answer.
    """
    # `with_retries` keeps what a bucket's client raised as the cause; its codes are those of HTTP.
    cause = error.__cause__ or error
    code = getattr(cause, "code", None)
    refused = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)
    wrong = error.errno in _WRONG or isinstance(error, _WRONG_KINDS) or refused
    named = error.filename2 or error.filename
    what = what or (os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else "")
    reason = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    wrong = wrong or str(cause).startswith("Forbidden")
    return (ConfigError if wrong else StorageError)(f"{what}: {reason}" if what else reason)


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
    1 StorageError, 2 ConfigError, 3 RunStoppedError, 130 KeyboardInterrupt; OSError as `storage_error` takes it.
    """
    codes = {StorageError: 1, ConfigError: 2, RunStoppedError: 3}
    try:
        return command() or 0
    except (*codes, OSError) as raised:
        error = storage_error(raised) if isinstance(raised, OSError) else raised
        sentence, code = f"error: {error}", next(code for kind, code in codes.items() if isinstance(error, kind))
    except KeyboardInterrupt as interrupt:
        sentence, code = str(interrupt) or "stopped", 130
    # What the error kept alive may complain when it goes (asyncio does): the sentence is the last line.
    gc.collect()
    print(sentence, file=sys.stderr)
    return code
