"""What the compiler said of a program, kept so that preflight of the same program need not compile it again.

    $XDG_CACHE_HOME (or ~/.cache)/baichuan_omni_jax/preflight/KEY.json.gz      the last `KEPT` of them

The key is of the traced program, kernels included, the devices, and the compilers' versions and options: whatever could
change the answer changes the key. A file that cannot be read is as good as none.
"""

import gzip
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from baichuan_omni_jax.storage import atomic_write, cache_home

KEPT = 64
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
log = logging.getLogger(__name__)


def program_key(program: str, devices: Sequence[Any], options: Mapping[str, str] = MappingProxyType({})) -> str:
    """Names a traced program (StableHLO) for these devices, options of the compilers and those that are installed."""
    places = [[str(getattr(one, name, "")) for name in ("device_kind", "coords", "slice_index")] for one in devices]
    versions = sorted((one.name, one.version) for one in metadata.distributions() if one.name in _COMPILERS)
    digest = hashlib.sha256(program.encode())
    digest.update(json.dumps([places, versions, sorted(options.items())]).encode())
    return digest.hexdigest()[:32]


def load_program(key: str) -> dict[str, Any] | None:
    """Returns what was kept under `key`; None where there is nothing that can be read."""
    path = _folder() / f"{key}.json.gz"
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError):
        return None
    # Used last, so kept longest.
    try:
        path.touch()
    except OSError:
        log.debug("%s cannot be touched", path)
    return found


def keep_program(key: str, answer: dict[str, Any]) -> None:
    """Keeps an answer, and removes those that were not used for longest. What cannot be written is not kept."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"{key}.json.gz", "wb", suffix=f".{os.getpid()}.partial") as file:
            file.write(gzip.compress(json.dumps(answer).encode(), 5))
        kept = sorted(folder.glob("*.json.gz"), key=lambda path: path.stat().st_mtime)
        for path in kept[:-KEPT]:
            path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("the answer could not be kept: %s", error)


def _folder() -> Path:
    return cache_home() / "preflight"
