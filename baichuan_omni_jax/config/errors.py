"""The error that a user can mend: one sentence, shown without a traceback, exit code 2."""


class ConfigError(ValueError):
    """Something the user gave (a key, a path, a mesh, a checkpoint) cannot be used; the message names it."""
