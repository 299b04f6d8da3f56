"""From a Hugging Face folder (and a vocoder's file) to a checkpoint of branches; memory holds one tensor at a time.

Also one branch straight into memory. `from_parts.py` puts a checkpoint together from several folders.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from baichuan_omni_jax.branches import VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import BranchInfo, abstract_branches, write_checksums
from baichuan_omni_jax.checkpoint.branches import BRANCHES_FILE, CONFIG, PROCESSOR, VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.config.vocoder import VocoderConfig, read_vocoder_config, vocoder_to_json
from baichuan_omni_jax.convert.files import copy_companions, list_companions, save_buffers
from baichuan_omni_jax.convert.leaf_store import BranchWriter
from baichuan_omni_jax.convert.plan import Advance, Plan, plan_from_tensors, rotary_buffers
from baichuan_omni_jax.convert.rules import Entry, Rule
from baichuan_omni_jax.convert.safetensors_io import (
    DTYPES,
    SafetensorsFile,
    TensorInfo,
    TensorSource,
    blocks_of,
    open_weights,
)
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.errors import ConfigError, list_some
from baichuan_omni_jax.nn.param import named_variables, with_values
from baichuan_omni_jax.storage import check_target, refuse_stand_in, staged_folder


@dataclass(frozen=True)
class ConversionJob:
    """A source of tensors and the plan of what becomes of them."""

    source: TensorSource
    plan: Plan


def plan_to_jax(source: Path, vocoder: Path | None = None, branches: Iterable[str] = ()) -> list[ConversionJob]:
    """Plans a conversion: reads every header and configuration, and no tensor.

    Args:
        source: a Hugging Face folder.
        vocoder: a vocoder's file, where it is converted too.
        branches: those of the model that are converted; default: all.

    Raises:
        ConfigError: names the file and the first tensors that do not fit.
    """
    cfg = read_hf(source / CONFIG)
    weights = open_weights(source)
    # A tokenizer that was never fetched is refused now, not after the weights have been moved.
    list_companions(source)
    tables = branch_rules(cfg)
    abstract = abstract_branches(cfg, only=branches)
    # Rotary buffers are computed from the configuration, here as in transformers: no rule has a place for them.
    dropped = rotary_buffers(weights, cfg)
    found = {name: info for name, info in weights.infos.items() if name not in dropped}
    plan = plan_from_tensors(found, tables, abstract, weights.location, only=branches)
    plan.dropped = dropped
    jobs = [ConversionJob(weights, plan)]
    if vocoder is not None:
        jobs.append(plan_vocoder(vocoder, cfg))
    return jobs


def convert_to_jax(
    source: Path,
    target: Path,
    *,
    vocoder: Path | None = None,
    jobs: list[ConversionJob] | None = None,
    advance: Advance = lambda done: None,
) -> None:
    """Converts a Hugging Face folder to a checkpoint of branches (docs/how-to/weights.md), whole or not at all.

    Args:
        source: the Hugging Face folder.
        target: the checkpoint to write; a folder that is not there, or empty.
        vocoder: a vocoder's file, where it is converted too.
        jobs: what `plan_to_jax` made of the same arguments (default: made here).
        advance: called with the bytes that are done, for a progress bar.

    Raises:
        ConfigError: something given cannot be used; nothing is left behind.
    """
    check_target(target)
    jobs = plan_to_jax(source, vocoder) if jobs is None else jobs
    with staged_folder(target) as folder:
        # Weights first, tensor by tensor.
        for job in jobs:
            for branch in job.plan.entries:
                leaves = job.plan.leaves[branch]
                writer = BranchWriter(folder / branch_folder(branch), leaves, stacked_axes(job.plan.entries[branch]))
                write_entries(writer, branch, job, advance)
                writer.close()
        # Then what is needed to give the very same files back: buffers, configuration, tokenizer and code.
        save_buffers(folder, jobs[0].source, jobs[0].plan.buffers)
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
        if vocoder is not None:
            sizes = vocoder_to_json(vocoder_sizes(vocoder))
            (folder / VOCODER_CONFIG).write_text(json.dumps(sizes, indent=1))
        copy_companions(source, folder / PROCESSOR)
        info = {name: asdict(line) for job in jobs for name, line in describe(job.plan).items()}
        (folder / BRANCHES_FILE).write_text(json.dumps(info, indent=2))
        # Last, as they cover all the others.
        write_checksums(folder)


def describe(plan: Plan) -> dict[str, BranchInfo]:
    """Returns the lines of `branches.json`."""
    lines = {}
    for branch, leaves in plan.leaves.items():
        dtypes = sorted({info.dtype.name for info in leaves.values()})
        count = sum(info.nbytes // info.dtype.itemsize for info in leaves.values())
        lines[branch] = BranchInfo(parameters=count, dtype="+".join(dtypes), trained=0)
    return lines


def load_branch_from_safetensors(
    source: TensorSource, rules: Iterable[Rule], abstract: Any, *, branch: str = "branch", dtype: Any = None
) -> Any:
    """Fills a branch's module in memory; tensors of other branches are left alone.

    Args:
        source: the tensors.
        rules: the branch's table (`branch_rules`).
        abstract: the module with shapes for values (`abstract_branches`).
        branch: its name in errors.
        dtype: of the parameters (default: as in `abstract`).

    Returns:
        The module on the mesh in use, each parameter whole on every device or split as in `abstract`.

    Raises:
        ConfigError: tensors do not fit, as in a conversion.
    """
    rules = tuple(rules)
    found = {name: info for name, info in source.infos.items() if any(rule.pattern.fullmatch(name) for rule in rules)}
    plan = plan_from_tensors(found, {branch: rules}, {branch: abstract}, source.location)
    variables = named_variables(abstract)
    values = {name: np.empty(info.shape, info.dtype) for name, info in plan.leaves[branch].items()}
    # Stacked parameters are filled layer by layer in host memory, then placed once.
    for entry in plan.entries[branch]:
        for leaf, index, value in pieces(entry, source, plan.leaves[branch]):
            values[leaf][index] = value
    return with_values(abstract, {name: _place(value, variables[name], dtype) for name, value in values.items()})


def pieces(
    entry: Entry, source: TensorSource, leaves: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, tuple[int | slice, ...], np.ndarray]]:
    """Reads a checkpoint tensor as (parameter, index, value): by blocks of rows where they stay rows, else whole."""
    rule, depth = entry.rule, len(entry.index)
    shapes = [leaves[leaf].shape[depth:] for leaf in entry.leaves]
    info = source.infos[entry.name]
    if rule.keeps_rows and entry.shape:
        for rows in blocks_of(entry.shape, info.dtype.itemsize):
            shape = (rows.stop - rows.start, *shapes[0][1:])
            yield entry.leaves[0], (*entry.index, rows), rule.forward(source.read(entry.name, rows), shape)
        return
    # A transform that mixes rows, or a packed tensor, needs the whole tensor in memory.
    tensor = source.read(entry.name)
    for leaf, shape, part in zip(entry.leaves, shapes, entry.parts or (...,), strict=True):
        yield leaf, entry.index, rule.forward(tensor[part], shape)


def vocoder_sizes(vocoder: Path) -> VocoderConfig:
    """Reads the `vocoder_config.json` next to a vocoder's file; where there is none, returns the released sizes."""
    path = vocoder.with_name(VOCODER_CONFIG)
    return read_vocoder_config(path) if path.is_file() else VocoderConfig()


def plan_vocoder(vocoder: Path, cfg: OmniConfig) -> ConversionJob:
    """Plans the vocoder's file. Raises ConfigError: another form, or mels that the model does not make."""
    # The file first: what is no file has no configuration beside it.
    file = open_vocoder(vocoder)
    sizes = vocoder_sizes(vocoder)
    if sizes.in_channels != cfg.flow.in_channels:
        raise ConfigError(
            f"vocoder {vocoder} reads {sizes.in_channels} mels (in_channels), the model makes {cfg.flow.in_channels}"
        )
    rules, abstract = branch_rules(cfg, sizes)[VOCODER_BRANCH], abstract_branches(cfg, sizes, only=[VOCODER_BRANCH])
    plan = plan_from_tensors(file.infos, {VOCODER_BRANCH: rules}, abstract, file.location)
    return ConversionJob(file, plan)


def stacked_axes(entries: Iterable[Entry]) -> dict[str, int]:
    """Returns of each parameter how many of its leading axes are layers, which are checkpoint tensors of their own."""
    return {leaf: len(entry.index) for entry in entries for leaf in entry.leaves}


def write_entries(writer: BranchWriter, branch: str, job: ConversionJob, advance: Advance) -> None:
    """Writes the parameters that `job` has of a branch, layer by layer."""
    for entry in job.plan.entries[branch]:
        for leaf, index, value in pieces(entry, job.source, job.plan.leaves[branch]):
            writer.write(leaf, index, value)
            advance(value.nbytes)


def _place(value: np.ndarray, variable: Any, dtype: Any) -> jax.Array:
    # Cast on the host: half the bytes travel to the device where the parameter is bf16.
    value = value.astype(jnp.dtype(dtype or variable.dtype))
    mesh = jax.sharding.get_mesh()
    sharding = getattr(variable.get_value(), "sharding", None)
    if sharding is None and not mesh.empty:
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(value, sharding)


class TorchFile:
    """The tensors of a `.pt` file, a flat state dict: what the released vocoder comes as.

    Needs torch (the extra `parity`). Read with `weights_only=True`: no code of it runs. Raises ConfigError.
    """

    def __init__(self, path: Path):
        self.location = str(path)
        refuse_stand_in(path)
        try:
            import torch
        except ImportError as error:
            raise ConfigError(
                f"{path} needs torch: pip install 'baichuan_omni_jax[parity]', or give safetensors"
            ) from error
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its parts raise
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ConfigError(f"{path} cannot be loaded with weights_only=True: {first[0]}") from error
        odd = [name for name, x in tensors.items() if not torch.is_tensor(x)] if isinstance(tensors, dict) else ["it"]
        if odd:
            raise ConfigError(f"{path} is not a flat dict of tensors: {list_some([*map(str, odd)], ', ')}")
        self._arrays = {name: _to_numpy(tensor, torch) for name, tensor in tensors.items()}
        self.infos = {name: TensorInfo(x.shape, x.dtype) for name, x in self._arrays.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a tensor, or some rows of it."""
        return self._arrays[name][slice(None) if rows is None else rows]


def open_vocoder(path: Path) -> SafetensorsFile | TorchFile:
    """Opens the vocoder's weights, by the file's ending. Raises ConfigError."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix not in (".pt", ".pth"):
        raise ConfigError(f"vocoder {path} is neither .safetensors nor .pt")
    if not path.is_file():
        raise ConfigError(f"vocoder {path} is not there")
    return TorchFile(path)


def _to_numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    # numpy has no bfloat16 of its own, so torch does not convert it: the bits are read as those of ml_dtypes.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["BF16"])
    return tensor.numpy()
