"""From a checkpoint of branches back to a Hugging Face folder, tensor by tensor."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from baichuan_omni_jax.branches import CONVERTED_BRANCHES, VOCODER_BRANCH, abstract_branches
from baichuan_omni_jax.checkpoint import branch_home, find_checkpoint, parse_spec, read_branch_info
from baichuan_omni_jax.checkpoint.branches import CONFIG, PROCESSOR, VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import read_hf
from baichuan_omni_jax.convert.files import VOCODER, copy_companions, load_buffers
from baichuan_omni_jax.convert.leaf_store import BranchReader
from baichuan_omni_jax.convert.plan import Plan, plan_from_leaves
from baichuan_omni_jax.convert.rules import Entry
from baichuan_omni_jax.convert.safetensors_io import SINGLE, TensorInfo, blocks_of
from baichuan_omni_jax.convert.safetensors_write import write_shards
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, read_json_object, staged_folder
from baichuan_omni_jax.vocoder.config import read_vocoder_config

Advance = Callable[[int], None]
SHARD_BYTES = 5 << 30
_FIRST = "model.embed_tokens.weight"
_DTYPE_KEYS = ("torch_dtype", "dtype")  # of transformers 4 and 5


@dataclass(frozen=True)
class Source:
    """Where each branch is read from, and the folder that the small files come from.

    `left_out` are branches of the checkpoints that the released model has no place for: a training run's own.
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
        """Every tensor to write, the model's order: by branch, then by table."""
        return self.plan.tensors | {name: TensorInfo(x.shape, x.dtype) for name, x in self.buffers.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """Of the tensors, computed buffers left out."""
        return sorted({info.dtype.name for info in self.plan.tensors.values()})

    @property
    def dtype(self) -> str:
        """What `config.json` gives as the dtype: of several that of the token embedding, as transformers does, or else
        that of most tensors.
        """
        first = self.plan.tensors.get(_FIRST)
        return first.dtype.name if first else _usual_dtype(self.plan).name

    def cast(self, dtype: str | None) -> None:
        """Makes every tensor `dtype`; with None all stay as they are stored."""
        if dtype is not None:
            tensors = self.plan.tensors
            tensors |= {name: TensorInfo(info.shape, np.dtype(dtype)) for name, info in tensors.items()}
            self.buffers.update({name: value.astype(dtype) for name, value in self.buffers.items()})


def open_source(spec: str, base: str | None = None) -> Source:
    """The branches of `spec` (`DIR` or `branch=DIR,...`; a workdir means its newest good step), the others from `base`.

    Small files come from `base` where there is one. Raises ConfigError, also where configurations differ.
    """
    sources = parse_spec(spec, CONVERTED_BRANCHES)
    if base is not None:
        sources |= {f"base of {name}": base for name in CONVERTED_BRANCHES}
    folders = {given: Path(find_checkpoint(given)) for given in dict.fromkeys(sources.values())}
    home = folders[base] if base is not None else next(iter(folders.values()))
    configs = {folder: read_hf(folder / CONFIG) for folder in folders.values()}
    for folder, config in configs.items():
        if config != configs[home]:
            raise ConfigError(f"{folder / CONFIG} and {home / CONFIG} describe different models")
    readers, vocoder_home = {}, None
    for name in CONVERTED_BRANCHES:
        candidates = [folders[sources[key]] for key in (name, f"base of {name}") if key in sources]
        folder = next((Path(held) for folder in candidates if (held := branch_home(folder, name))), None)
        if folder is not None:
            readers[name] = BranchReader(folder / branch_folder(name))
            if name == VOCODER_BRANCH:
                vocoder_home = folder if (folder / VOCODER_CONFIG).is_file() else home
    if not readers:
        raise ConfigError(f"checkpoint {spec!r} holds no branch that can be converted")
    there = {name: None for folder in folders.values() for name in read_branch_info(folder)}
    return Source(readers, home, vocoder_home, tuple(name for name in there if name not in CONVERTED_BRANCHES))


def plan_to_torch(source: Source, dtype: str | None = None) -> dict[str, Export]:
    """File name (`model.safetensors`, `vocoder.safetensors`) -> what to write in it, as `dtype` or as it is stored.

    Raises ConfigError naming every parameter that does not fit.
    """
    cfg = read_hf(source.home / CONFIG)
    exports = {}
    model = {name: reader.infos for name, reader in source.readers.items() if name != VOCODER_BRANCH}
    if model:
        plan = plan_from_leaves(model, branch_rules(cfg), abstract_branches(cfg, only=model), str(source.home))
        kind = np.dtype(dtype or _usual_dtype(plan))
        exports[SINGLE] = Export(plan, load_buffers(source.home, plan.buffers, kind))
    if VOCODER_BRANCH in source.readers:
        sizes = read_vocoder_config(source.vocoder_home / VOCODER_CONFIG)
        stored = {VOCODER_BRANCH: source.readers[VOCODER_BRANCH].infos}
        abstract = abstract_branches(cfg, sizes, only=stored)
        plan = plan_from_leaves(stored, branch_rules(cfg, sizes), abstract, str(source.vocoder_home))
        exports[VOCODER] = Export(plan, {})
    for export in exports.values():
        export.cast(dtype)
    return exports


def convert_to_torch(
    source: Source,
    target: Path,
    *,
    exports: dict[str, Export] | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Advance = lambda done: None,
) -> None:
    """Writes the Hugging Face folder `target`. `exports` is what `plan_to_torch` made of the same source.

    `config.json` is the source's own, with `torch_dtype` (or `dtype`) that of the tensors (`Export.dtype`). Raises
    ConfigError, and leaves nothing behind then.
    """
    check_target(target)
    exports = plan_to_torch(source) if exports is None else exports
    with staged_folder(target) as folder:
        for name, export in exports.items():
            write_export(folder, name, export, source.readers, shard_bytes, advance)
        dtype = exports[SINGLE].dtype if SINGLE in exports else None
        (folder / CONFIG).write_bytes(_config_bytes(source.home / CONFIG, dtype))
        copy_companions(source.home / PROCESSOR, folder)
        if source.vocoder_home is not None:
            (folder / VOCODER_CONFIG).write_bytes((source.vocoder_home / VOCODER_CONFIG).read_bytes())


def _config_bytes(path: Path, dtype: str | None) -> bytes:
    """The file at `path` byte for byte where it says `dtype` already, else with that changed. None: no tensors."""
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
        readers: the branches by name.
        shard_bytes: a file is not larger.
        advance: hears of bytes that are written.
        changes: tensor -> what is done to each block of its rows.
    """
    owners = {entry.name: (readers[branch], entry) for branch, rows in export.plan.entries.items() for entry in rows}
    tensors = export.tensors

    def blocks(tensor: str) -> Iterator[np.ndarray]:
        found = [export.buffers[tensor]] if tensor in export.buffers else _blocks(*owners[tensor])
        found = map(changes[tensor], found) if tensor in changes else found
        return _counted(found, tensors[tensor].dtype, advance)

    write_shards(folder, name, tensors, shard_bytes, blocks)


def _blocks(reader: BranchReader, entry: Entry) -> Iterator[np.ndarray]:
    """A checkpoint tensor from one layer of its parameters: by blocks of rows, part by part, or whole."""
    rule = entry.rule
    if rule.keeps_rows and entry.shape:
        leaf = entry.leaves[0]
        for rows in blocks_of(entry.shape, reader.infos[leaf].dtype.itemsize):
            yield rule.backward(reader.read(leaf, (*entry.index, rows)))
        return
    for leaf in entry.leaves:
        yield rule.backward(reader.read(leaf, entry.index))


def _counted(blocks: Iterable[np.ndarray], dtype: np.dtype, advance: Advance) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block.astype(dtype, copy=False)
        advance(block.nbytes)


def _usual_dtype(plan: Plan) -> np.dtype:
    """The dtype of most of the tensors."""
    kinds = [info.dtype for info in plan.tensors.values()]
    return max(set(kinds), key=kinds.count)
