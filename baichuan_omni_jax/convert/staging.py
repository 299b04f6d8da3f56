"""A folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baichuan_omni_jax.errors import ConfigError


def check_target(target: Path) -> None:
    """Raises ConfigError when `target` is there and is not an empty folder, or has no place to be."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} already exists and is not empty; nothing was written")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{target} cannot be made: {above} is not a folder")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target` that takes its place at the end, or vanishes when anything is raised."""
    check_target(target)
    made = _make_parents(target)
    temporary = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        check_target(target)  # another program may have filled it meanwhile
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise


def _make_parents(target: Path) -> list[Path]:
    """Makes the folders above `target`; returns those that were not there, deepest first."""
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target.parent} cannot be made: {error.strerror}") from error
    return made
