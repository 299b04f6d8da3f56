"""Compiled programs that the next start of a run finds: compiling takes minutes of every chip of a slice."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from baichuan_omni_jax.errors import storage_error
from baichuan_omni_jax.storage import is_url, parse_path

FOLDER = "compilation_cache"
# Of `--compilation-cache`: none.
OFF = "off"
# Seconds that compiling a program must take to be kept: hundreds of small ones are found no sooner than made.
_WORTH_KEEPING = 0.3
_FOLDER_KEY = "jax_compilation_cache_dir"
_MINIMUM = "jax_persistent_cache_min_compile_time_secs"


@contextmanager
def keep_compiled(workdir: epath.Path, chosen: str) -> Iterator[None]:
    """Keeps compiled programs in a folder while the context is open, and finds those of earlier starts there.

    JAX's own settings (JAX_COMPILATION_CACHE_DIR and what goes with it) come first, where they are given.

    Args:
        workdir: the run's: all its hosts see it, and host 0 alone writes programs.
        chosen: another folder, path or URL; "": one in the workdir; `off`: none.

    Raises:
        ConfigError: the folder that was chosen cannot be made, or the URL not be served.
    """
    if chosen.lower() == OFF or getattr(jax.config, _FOLDER_KEY):
        yield
        return
    folder = parse_path(chosen) if chosen else workdir / FOLDER
    # JAX would warn of each program, and go on without.
    if chosen and not is_url(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"--compilation-cache {folder} cannot be made") from error
    before = getattr(jax.config, _MINIMUM)
    jax.config.update(_FOLDER_KEY, os.fspath(folder / _machine()))
    if _MINIMUM.upper() not in os.environ:
        jax.config.update(_MINIMUM, _WORTH_KEEPING)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        # What else this process compiles is none of the run's.
        jax.config.update(_FOLDER_KEY, None)
        jax.config.update(_MINIMUM, before)
        compilation_cache.reset_cache()


def _machine() -> str:
    """Names the kind of machine: JAX's own key does not tell which instructions a CPU has."""
    backend = jax.default_backend()
    if backend != "cpu":
        return backend
    flags = ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"cpu-{hashlib.sha256(f'{platform.machine()} {flags}'.encode()).hexdigest()[:8]}"
