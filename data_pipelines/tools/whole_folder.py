"""Folders that are built whole or not at all: filled beside their place, renamed at the end, described by a summary."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError


def build_whole(
    out: str | Path,
    summary: str,
    identity: Mapping[str, Any],
    fill: Callable[[Path], Mapping[str, Any]],
    *,
    own_names: frozenset[str],
    kind: str,
) -> Path:
    """Builds a folder at `out`, or finds it there complete and of this identity, and returns its path.

    Everything is made in `OUT.partial` and renamed at the end, so `out` is either complete or untouched.

    Args:
        out: the folder.
        summary: the name of the JSON file that makes it complete.
        identity: entries of the summary that tell whether a folder is what this call would build.
        fill: writes everything else into an empty folder; returns further entries of the summary.
        own_names: what such a folder may hold beside the summary; nothing else is ever replaced.
        kind: what errors call its contents.

    Raises:
        ConfigError: `out` is a file, or holds what is not in `own_names`.
    """
    out = Path(out).expanduser().resolve()
    # Complete and of this identity: nothing to do. Anything that is not ours is never replaced.
    if _is_complete(out / summary, identity):
        return out
    partial = out.with_name(out.name + ".partial")
    for folder in (out, partial):
        _refuse_foreign(folder, own_names | {summary, ".cache"}, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    entries = {**identity, **fill(partial)}
    (partial / summary).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    # The summary is the last file, the rename the last step: a kill leaves the old data set or the new one.
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    return out


def _is_complete(summary: Path, identity: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        return all(found[name] == value for name, value in identity.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_foreign(folder: Path, own_names: frozenset[str], kind: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, so the {kind} cannot be built there")
    foreign = sorted({entry.name for entry in folder.iterdir()} - own_names) if folder.exists() else []
    if foreign:
        raise ConfigError(
            f"{folder} is not empty and holds {foreign[0]!r}, which is no {kind}: "
            "name a new or empty folder; nothing was changed"
        )
