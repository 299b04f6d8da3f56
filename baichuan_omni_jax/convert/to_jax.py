"""From a Hugging Face folder (and a vocoder's file) to a checkpoint of branches; memory holds one tensor at a time."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from baichuan_omni_jax.branches import VOCODER_BRANCH, abstract_branches
from baichuan_omni_jax.checkpoint import BranchInfo, write_checksums
from baichuan_omni_jax.checkpoint.branches import BRANCHES_FILE, CONFIG, PROCESSOR, VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import OmniConfig, read_hf
from baichuan_omni_jax.convert.buffers import rotary_buffers
from baichuan_omni_jax.convert.files import copy_companions, list_companions, save_buffers
from baichuan_omni_jax.convert.leaf_store import BranchWriter
from baichuan_omni_jax.convert.plan import Plan, plan_from_tensors
from baichuan_omni_jax.convert.rules import Entry, Rule
from baichuan_omni_jax.convert.safetensors_io import TensorSource, blocks_of, open_weights
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.convert.torch_file import open_vocoder
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_variables, with_values
from baichuan_omni_jax.storage import check_target, staged_folder
from baichuan_omni_jax.vocoder.config import VocoderConfig, read_vocoder_config, vocoder_to_json

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """A source of tensors and what becomes of them."""

    source: TensorSource
    plan: Plan


def plan_to_jax(source: Path, vocoder: Path | None = None, branches: Iterable[str] = ()) -> list[Job]:
    """Reads every header and config of a conversion. `branches` (default: all) of the model, and the vocoder if given.

    Raises ConfigError naming the file and every tensor that does not fit.
    """
    cfg = read_hf(source / CONFIG)
    weights = open_weights(source)
    list_companions(source)
    tables = branch_rules(cfg)
    abstract = abstract_branches(cfg, only=branches)
    dropped = rotary_buffers(weights, cfg)
    found = {name: info for name, info in weights.infos.items() if name not in dropped}
    plan = plan_from_tensors(found, tables, abstract, weights.where, only=branches)
    plan.dropped = dropped
    jobs = [Job(weights, plan)]
    if vocoder is not None:
        jobs.append(_plan_vocoder(vocoder, cfg))
    return jobs


def convert_to_jax(
    source: Path,
    target: Path,
    *,
    vocoder: Path | None = None,
    jobs: list[Job] | None = None,
    advance: Advance = lambda done: None,
) -> None:
    """Writes the checkpoint `target` (docs/how-to/weights.md) from the Hugging Face folder `source`.

    `jobs` is what `plan_to_jax` made of the same arguments; `advance` hears of bytes that are done. Raises ConfigError,
    and leaves nothing behind then.
    """
    check_target(target)
    jobs = plan_to_jax(source, vocoder) if jobs is None else jobs
    with staged_folder(target) as folder:
        for job in jobs:
            for branch in job.plan.entries:
                _write_branch(folder / branch_folder(branch), branch, job, advance)
        save_buffers(folder, jobs[0].source, jobs[0].plan.buffers)
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
        if vocoder is not None:
            sizes = vocoder_to_json(vocoder_sizes(vocoder))
            (folder / VOCODER_CONFIG).write_text(json.dumps(sizes, indent=1))
        copy_companions(source, folder / PROCESSOR)
        info = {name: asdict(line) for job in jobs for name, line in describe(job.plan).items()}
        (folder / BRANCHES_FILE).write_text(json.dumps(info, indent=2))
        write_checksums(folder)


def describe(plan: Plan) -> dict[str, BranchInfo]:
    """The lines of `branches.json`."""
    lines = {}
    for branch, leaves in plan.leaves.items():
        dtypes = sorted({info.dtype.name for info in leaves.values()})
        count = sum(info.nbytes // info.dtype.itemsize for info in leaves.values())
        lines[branch] = BranchInfo(parameters=count, dtype="+".join(dtypes), trained=0)
    return lines


def load_branch_from_safetensors(
    source: TensorSource, rules: Iterable[Rule], abstract: Any, *, branch: str = "branch", dtype: Any = None
) -> Any:
    """The module `abstract` filled from `source` by a branch's `rules`; tensors of other branches are left alone.

    In memory, on the current mesh (whole on each device, or as the abstract parameter says), in `dtype` or else in the
    abstract parameter's. Raises ConfigError as a conversion would.
    """
    rules = tuple(rules)
    found = {name: info for name, info in source.infos.items() if any(rule.pattern.fullmatch(name) for rule in rules)}
    plan = plan_from_tensors(found, {branch: rules}, {branch: abstract}, source.where)
    variables = named_variables(abstract)
    values = {name: np.empty(info.shape, info.dtype) for name, info in plan.leaves[branch].items()}
    for entry in plan.entries[branch]:
        for leaf, index, value in pieces(entry, source, plan.leaves[branch]):
            values[leaf][index] = value
    return with_values(abstract, {name: _place(value, variables[name], dtype) for name, value in values.items()})


def pieces(entry: Entry, source: TensorSource, leaves: Mapping[str, Any]):
    """(parameter, index, value) of a checkpoint tensor: block by block of rows where its rows stay rows."""
    rule, depth = entry.rule, len(entry.index)
    shapes = [leaves[leaf].shape[depth:] for leaf in entry.leaves]
    info = source.infos[entry.name]
    if rule.keeps_rows and entry.shape:
        for rows in blocks_of(entry.shape, info.dtype.itemsize):
            shape = (rows.stop - rows.start, *shapes[0][1:])
            yield entry.leaves[0], (*entry.index, rows), rule.forward(source.read(entry.name, rows), shape)
        return
    tensor = source.read(entry.name)
    for leaf, shape, part in zip(entry.leaves, shapes, entry.parts or (...,), strict=True):
        yield leaf, entry.index, rule.forward(tensor[part], shape)


def vocoder_sizes(vocoder: Path) -> VocoderConfig:
    """The sizes in the `vocoder_config.json` next to a vocoder's file; where there is none, the released ones."""
    path = vocoder.with_name(VOCODER_CONFIG)
    return read_vocoder_config(path) if path.is_file() else VocoderConfig()


def _plan_vocoder(vocoder: Path, cfg: OmniConfig) -> Job:
    sizes, file = vocoder_sizes(vocoder), open_vocoder(vocoder)
    if sizes.in_channels != cfg.flow.in_channels:
        raise ConfigError(
            f"vocoder {vocoder} reads {sizes.in_channels} mels (in_channels), the model makes {cfg.flow.in_channels}"
        )
    rules, abstract = branch_rules(cfg, sizes)[VOCODER_BRANCH], abstract_branches(cfg, sizes, only=[VOCODER_BRANCH])
    plan = plan_from_tensors(file.infos, {VOCODER_BRANCH: rules}, abstract, file.where)
    return Job(file, plan)


def _write_branch(folder: Path, branch: str, job: Job, advance: Advance) -> None:
    entries, leaves = job.plan.entries[branch], job.plan.leaves[branch]
    depth = {leaf: len(entry.index) for entry in entries for leaf in entry.leaves}
    writer = BranchWriter(folder, leaves, depth)
    for entry in entries:
        for leaf, index, value in pieces(entry, job.source, leaves):
            writer.write(leaf, index, value)
            advance(value.nbytes)
    writer.close()


def _place(value: np.ndarray, variable: Any, dtype: Any) -> jax.Array:
    value = value.astype(jnp.dtype(dtype or variable.dtype))
    mesh = jax.sharding.get_mesh()
    sharding = getattr(variable.get_value(), "sharding", None)
    if sharding is None and not mesh.empty:
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(value, sharding)
