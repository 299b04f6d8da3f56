"""The user's own programs, by dotted path: `package.module:factory` names a callable that returns the object to use."""

import importlib
from collections.abc import Callable
from functools import lru_cache

from baichuan_omni_jax.errors import ConfigError


@lru_cache(maxsize=8)
def load_hook(option: str, name: str, *methods: str) -> object:
    """What the factory called `name` returns, made once a process; `option` names where it was given.

    Raises ConfigError when there is none, or when what it returns lacks one of `methods`.
    """
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
    """What is called `name`, `package.module:function`. Raises ConfigError when there is none; it is called `word`."""
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
