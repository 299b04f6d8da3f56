"""The small files around a model's weights, and what a converted checkpoint remembers of its source."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from baichuan_omni_jax.checkpoint.branches import CONFIG, SOURCE, VOCODER_CONFIG
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.convert.safetensors_io import SafetensorsFile, SafetensorsWriter, TensorInfo, TensorSource
from baichuan_omni_jax.errors import ConfigError, list_some
from baichuan_omni_jax.storage import describe_stand_in, read_json_object

VOCODER = "vocoder.safetensors"
# Source buffers that computing does not give back to the bit. `SOURCE` has the dtype of each of them.
CARRIED = "source_buffers.safetensors"
_SUFFIXES = frozenset({".json", ".txt", ".model", ".tiktoken", ".jinja", ".py"})
_NOT_COPIED = frozenset({CONFIG, VOCODER_CONFIG, SOURCE})
_RELATIVE_IMPORT = re.compile(r"^\s*from \.(\w+)[\w.]* import", re.MULTILINE)
# A position table that differs by more is another table.
_TOLERANCE = 0.02


def list_companions(source: Path) -> list[str]:
    """Lists the tokenizer, processor and code files of a folder by name: not weights, not config.json.

    Raises ConfigError for one that is a pointer of Git LFS or git-annex: it would be found out only when it is used.
    """
    names = sorted(path.name for path in source.iterdir() if _is_companion(path)) if source.is_dir() else []
    for name in names:
        if "pointer" in (found := describe_stand_in(source / name)):
            raise ConfigError(f"{source / name} is {found}")
    return names


def copy_companions(source: Path, target: Path) -> None:
    """Copies what `list_companions` names. Raises ConfigError as it does."""
    for name in list_companions(source):
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def missing_code(folder: Path) -> list[str]:
    """Lists Python files that a Hugging Face folder lacks, though its `config.json` (`auto_map`) or code names them.

    Empty where the configuration names no code at all: then nothing runs this folder.
    """
    named = read_json_object(folder / CONFIG).get("auto_map")
    classes = [name for name in named.values() if isinstance(name, str)] if isinstance(named, dict) else []
    # Modules import one another: followed until none is new. `repository--module.Class` lies elsewhere.
    left = [name.partition(".")[0] for name in classes if "--" not in name]
    missing, seen = [], set()
    while left:
        if (module := left.pop()) in seen:
            continue
        seen.add(module)
        path = folder / f"{module}.py"
        if path.is_file():
            left += _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
        else:
            missing.append(path.name)
    return sorted(missing)


def save_buffers(folder: Path, source: TensorSource, buffers: Mapping[str, Rule]) -> None:
    """Writes down which buffers the source held: the dtype where computing gives their very bytes, else all of it.

    Args:
        folder: the checkpoint to write into.
        source: the tensors as they were.
        buffers: the buffers among them, with the rule that computes each.

    Raises:
        ConfigError: a buffer is another table than the one that is computed.
    """
    dtypes, carried, problems = {}, {}, []
    for name, rule in buffers.items():
        found = source.read(name)
        dtypes[name] = found.dtype.name
        exact = rule.restored()
        rounded = exact.astype(found.dtype)
        # Bytes decide, not values: a round trip gives the very same file back.
        if found.shape != rounded.shape or found.tobytes() != rounded.tobytes():
            carried[name] = found
            problems += check_buffer(name, found, exact)
    if problems:
        raise ConfigError(f"{source.location} cannot be converted: {list_some(problems)}")
    (folder / SOURCE).write_text(json.dumps({"buffers": dtypes}, indent=1))
    if carried:
        infos = {name: TensorInfo(value.shape, value.dtype) for name, value in carried.items()}
        writer = SafetensorsWriter(folder / CARRIED, infos)
        for name in writer.order(infos):
            writer.write(name, [carried[name]])
        writer.close()


def check_buffer(name: str, found: np.ndarray, computed: np.ndarray) -> list[str]:
    """Lists what is wrong: a buffer may be longer or rounded otherwise, but must be the table that we compute."""
    if found.ndim != 2 or found.shape[1] != computed.shape[1]:
        return [f"buffer {name} has shape {list(found.shape)}, the computed one {list(computed.shape)}"]
    rows = min(len(found), len(computed))
    error = np.abs(found[:rows].astype(np.float32) - computed[:rows]).max(initial=0.0)
    return [] if error <= _TOLERANCE else [f"buffer {name} is not the table it is computed as (off by {error:.2g})"]


def load_buffers(folder: Path, buffers: Mapping[str, Rule], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Returns the buffers to write back: those the source held, or where nothing is known of one, all, in `dtype`."""
    if not (folder / SOURCE).is_file():
        return {name: rule.restored().astype(dtype) for name, rule in buffers.items()}
    try:
        dtypes = json.loads((folder / SOURCE).read_text())["buffers"]
        carried = SafetensorsFile(folder / CARRIED) if (folder / CARRIED).is_file() else None
        return {
            name: carried.read(name) if carried and name in carried.infos else rule.restored().astype(dtypes[name])
            for name, rule in buffers.items()
            if name in dtypes
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / SOURCE} cannot be used: {error}") from error


def _is_companion(path: Path) -> bool:
    weights_index = path.name.endswith(".index.json")
    return path.is_file() and path.suffix in _SUFFIXES and path.name not in _NOT_COPIED and not weights_index
