"""The user's own programs, by dotted path: `package.module:factory` names a callable that returns the object to use."""

import importlib
from functools import lru_cache

from baichuan_omni_jax.config import ConfigError


@lru_cache(maxsize=8)
def load_hook(option: str, name: str, *methods: str) -> object:
    """What the factory called `name` returns, made once a process; `option` names where it was given.

    Raises ConfigError when there is none, or when what it returns lacks one of `methods`.
    """
    module, separator, factory = name.partition(":")
    if not (module and separator and factory):
        raise ConfigError(f"{option} {name}: not of the form package.module:factory")
    try:
        hook = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {name} cannot be loaded: {error}") from error
    for method in methods:
        if not callable(getattr(hook, method, None)):
            raise ConfigError(f"{option} {name}: what it returns has no method {method}")
    return hook
