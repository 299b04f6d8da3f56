"""From a checkpoint of branches back to a Hugging Face folder of the released model's form, tensor by tensor.

`to_parts.py` writes one part alone, as the public model that it has the form of.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from etils import epath

from baichuan_omni_jax.branches import CONVERTED_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import abstract_branches, branch_home, find_checkpoint, parse_spec, read_branch_info
from baichuan_omni_jax.checkpoint.branches import CONFIG, PROCESSOR, VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import read_hf
from baichuan_omni_jax.config.vocoder import read_vocoder_config
from baichuan_omni_jax.convert.files import VOCODER, copy_companions, load_buffers
from baichuan_omni_jax.convert.leaf_store import BranchReader
from baichuan_omni_jax.convert.plan import Advance, Plan, plan_from_leaves
from baichuan_omni_jax.convert.rules import Entry
from baichuan_omni_jax.convert.safetensors_io import SINGLE, TensorInfo, blocks_of, write_shards
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, is_url, read_json_object, staged_folder
from baichuan_omni_jax.storage.given import local_copy

SHARD_BYTES = 5 << 30
_EMBEDDING = "model.embed_tokens.weight"
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of transformers 4 and 5


@dataclass(frozen=True)
class CheckpointSource:
    """Where a conversion back to PyTorch reads from.

    Attributes:
        readers: branch -> its parameters.
        home: the checkpoint that the small files come from, or a copy of them.
        vocoder_home: the same of the vocoder's sizes; None without a vocoder.
        left_out: branches of the checkpoints that the released model has no place for: a training run's own.
    """

    readers: dict[str, BranchReader]
    home: Path
    vocoder_home: Path | None
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Export:
    """One file or set of shards: the plan of its branches, and buffers that are computed, not read."""

    plan: Plan
    buffers: dict[str, np.ndarray]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Returns every tensor to write, in the model's order: by branch, then by table."""
        return self.plan.tensors | {name: TensorInfo(x.shape, x.dtype) for name, x in self.buffers.items()}

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """Returns the tensors' dtypes, computed buffers left out."""
        return sorted({info.dtype.name for info in self.plan.tensors.values()})

    @property
    def dtype(self) -> str:
        """Returns what `config.json` gives as the dtype.

        Of several it is that of the token embedding, as in transformers, or without one that of most tensors.
        """
        first = self.plan.tensors.get(_EMBEDDING)
        return first.dtype.name if first else usual_dtype(self.plan).name

    def cast(self, dtype: str | None) -> None:
        """Makes every tensor `dtype`; with None all stay as they are stored."""
        if dtype is not None:
            tensors = self.plan.tensors
            tensors |= {name: TensorInfo(info.shape, np.dtype(dtype)) for name, info in tensors.items()}
            self.buffers.update({name: value.astype(dtype) for name, value in self.buffers.items()})


def open_source(spec: str, base: str | None = None) -> CheckpointSource:
    """Opens the branches of `spec` (`DIR` or `branch=DIR,...`; a workdir is its newest good step), others from `base`.

    Folders may be URLs: parameters are read where they are. Small files come from `base` where there is one. Raises
    ConfigError, also where configurations differ.
    """
    sources = parse_spec(spec, CONVERTED_BRANCHES)
    # A run trains and saves some branches; the others come from the checkpoint that it began with.
    if base is not None:
        sources |= {f"base of {name}": base for name in CONVERTED_BRANCHES}
    folders = {given: find_checkpoint(given) for given in dict.fromkeys(sources.values())}
    home = folders[base] if base is not None else next(iter(folders.values()))
    # One config.json is written: branches of models of other sizes cannot lie under it.
    small = {folder: _small_files(folder) for folder in folders.values()}
    configs = {folder: read_hf(small[folder] / CONFIG) for folder in folders.values()}
    for folder, config in configs.items():
        if config != configs[home]:
            raise ConfigError(f"{folder / CONFIG} and {home / CONFIG} describe different models")
    readers, vocoder_home = {}, None
    for name in CONVERTED_BRANCHES:
        candidates = [folders[sources[key]] for key in (name, f"base of {name}") if key in sources]
        folder = next((held for folder in candidates if (held := branch_home(folder, name))), None)
        if folder is not None:
            readers[name] = BranchReader(folder / branch_folder(name))
            if name == VOCODER_BRANCH:
                own = small[folder] if folder in small else _small_files(folder)
                vocoder_home = own if (own / VOCODER_CONFIG).is_file() else small[home]
    if not readers:
        raise ConfigError(f"checkpoint {spec!r} holds no branch that can be converted")
    there = {name: None for folder in folders.values() for name in read_branch_info(folder)}
    return CheckpointSource(
        readers, small[home], vocoder_home, tuple(name for name in there if name not in CONVERTED_BRANCHES)
    )


def _small_files(folder: epath.Path) -> Path:
    """Returns a folder of this machine with what a checkpoint has beside its arrays."""
    return local_copy(folder, wanted=_is_small) if is_url(folder) else Path(folder)


def _is_small(name: str) -> bool:
    return not name.startswith(("params/", "opt_state/"))


def plan_to_torch(source: CheckpointSource, dtype: str | None = None) -> dict[str, Export]:
    """Plans an export: file name (`model.safetensors`, `vocoder.safetensors`) -> what to write in it.

    Tensors are written as `dtype`, or (None) as they are stored.

    Raises ConfigError naming every parameter that does not fit.
    """
    cfg = read_hf(source.home / CONFIG)
    # The model's six branches make one file or set of shards, the vocoder its own.
    exports = {}
    model = {name: reader.infos for name, reader in source.readers.items() if name != VOCODER_BRANCH}
    if model:
        plan = plan_from_leaves(model, branch_rules(cfg), abstract_branches(cfg, only=model), str(source.home))
        # Buffers were never parameters: they take the dtype that most tensors have.
        kind = np.dtype(dtype or usual_dtype(plan))
        exports[SINGLE] = Export(plan, load_buffers(source.home, plan.buffers, kind))
    if VOCODER_BRANCH in source.readers and source.vocoder_home is not None:
        sizes = read_vocoder_config(source.vocoder_home / VOCODER_CONFIG)
        stored = {VOCODER_BRANCH: source.readers[VOCODER_BRANCH].infos}
        abstract = abstract_branches(cfg, sizes, only=stored)
        plan = plan_from_leaves(stored, branch_rules(cfg, sizes), abstract, str(source.vocoder_home))
        exports[VOCODER] = Export(plan, {})
    for export in exports.values():
        export.cast(dtype)
    return exports


def convert_to_torch(
    source: CheckpointSource,
    target: Path,
    *,
    exports: dict[str, Export] | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda done: None,
) -> None:
    """Writes a Hugging Face folder of the released form, whole or not at all.

    `config.json` is the source's own, with `torch_dtype` (or `dtype`) that of the tensors (`Export.dtype`).

    Args:
        source: the branches.
        target: the folder to write, which is not there, or empty.
        exports: what `plan_to_torch` made of the same source (default: made here).
        shard_bytes: how large a safetensors file may be.
        advance: called with the bytes that are done, for a progress bar.

    Raises:
        ConfigError: something given cannot be used; nothing is left behind.
    """
    check_target(target)
    exports = plan_to_torch(source) if exports is None else exports
    with staged_folder(target) as folder:
        for name, export in exports.items():
            write_export(folder, name, export, source.readers, shard_bytes, advance)
        # The small files: config.json, tokenizer and code, the vocoder's sizes.
        dtype = exports[SINGLE].dtype if SINGLE in exports else None
        (folder / CONFIG).write_bytes(_config_bytes(source.home / CONFIG, dtype))
        copy_companions(source.home / PROCESSOR, folder)
        if source.vocoder_home is not None:
            (folder / VOCODER_CONFIG).write_bytes((source.vocoder_home / VOCODER_CONFIG).read_bytes())


def _config_bytes(path: Path, dtype: str | None) -> bytes:
    """Returns `config.json` byte for byte where it gives `dtype` already, else with that changed. None: no tensors."""
    values = read_json_object(path)
    stated = {key: dtype for key in _DTYPE_KEYS if key in values} or {_DTYPE_KEYS[0]: dtype}
    if dtype is None or all(values.get(key) == dtype for key in stated):
        return path.read_bytes()
    return json.dumps(values | stated, indent=2, ensure_ascii=False).encode()


def write_export(
    folder: Path,
    name: str,
    export: Export,
    readers: Mapping[str, BranchReader],
    shard_bytes: int,
    advance: Advance,
    changes: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType({}),
) -> None:
    """Writes the tensors of `export` into `folder` as the file `name` or its shards.

    Args:
        folder: where the files are written.
        name: the file's name, `model.safetensors`.
        export: which tensors, and which of the branches' parameters they are made of.
        readers: the branches by name.
        shard_bytes: how large a file may be.
        advance: called with the bytes that are written.
        changes: tensor -> what is done to each block of its rows.
    """
    # Tensor -> the branch and the plan's entry that it is read from, so that any order can be written.
    owners = {entry.name: (readers[branch], entry) for branch, rows in export.plan.entries.items() for entry in rows}
    tensors = export.tensors

    def blocks(tensor: str) -> Iterator[np.ndarray]:
        found = [export.buffers[tensor]] if tensor in export.buffers else _blocks(*owners[tensor])
        for block in map(changes[tensor], found) if tensor in changes else found:
            cast = block.astype(tensors[tensor].dtype, copy=False)
            yield cast
            advance(cast.nbytes)

    write_shards(folder, name, tensors, shard_bytes, blocks)


def _blocks(reader: BranchReader, entry: Entry) -> Iterator[np.ndarray]:
    """Reads a checkpoint tensor from one layer of its parameters: by blocks of rows, part by part, or whole."""
    rule = entry.rule
    if rule.keeps_rows and entry.shape:
        leaf = entry.leaves[0]
        for rows in blocks_of(entry.shape, reader.infos[leaf].dtype.itemsize):
            yield rule.backward(reader.read(leaf, (*entry.index, rows)))
        return
    # Parts of a packed tensor (Q, K, V) follow one another on its first axis: each is a block of rows.
    for leaf in entry.leaves:
        yield rule.backward(reader.read(leaf, entry.index))


def usual_dtype(plan: Plan) -> np.dtype:
    """Returns the dtype of most of the tensors."""
    kinds = [info.dtype for info in plan.tensors.values()]
    return max(set(kinds), key=kinds.count)
