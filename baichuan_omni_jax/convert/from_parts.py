"""From public models to a checkpoint where the recipe starts: Qwen2.5, Qwen2-VL's vision tower, Whisper, a vocoder.

Any of them may be left out; what no part gives is drawn as a new module draws it, and named so. Tensors stream: memory
holds one of them, or a block of its rows, whatever the size of the model. The folder appears whole or not at all, and
its `parent.json` says which branch came from where and what is random.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from baichuan_omni_jax.branches import MODEL_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import BranchInfo, Parent, abstract_branches, write_checksums
from baichuan_omni_jax.checkpoint.branches import BRANCHES_FILE, CONFIG, PROCESSOR, VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.checkpoint.provenance import PARENT
from baichuan_omni_jax.config import OmniConfig, to_hf
from baichuan_omni_jax.config.parts import TextVocabulary
from baichuan_omni_jax.config.vocoder import vocoder_to_json
from baichuan_omni_jax.convert.files import save_buffers
from baichuan_omni_jax.convert.leaf_store import BranchWriter
from baichuan_omni_jax.convert.parts import PublicParts, plan_llm, plan_vision, plan_whisper, read_sizes
from baichuan_omni_jax.convert.plan import Advance, Plan, describe_plan
from baichuan_omni_jax.convert.rules import expand
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, blocks_of
from baichuan_omni_jax.convert.tables import branch_rules
from baichuan_omni_jax.convert.to_jax import (
    ConversionJob,
    describe,
    plan_vocoder,
    stacked_axes,
    vocoder_sizes,
    write_entries,
)
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_variables
from baichuan_omni_jax.storage import check_target, staged_folder

# Of all that is drawn: the same parts make the same checkpoint.
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class PartsPlan:
    """What putting parts together will do.

    Attributes:
        config: the model's sizes.
        jobs: what is read, by part.
        drawn: branch -> the parameters that no part gives.
        parent: what `parent.json` will say.
        vocabulary: the text tokenizer; None without a language model.
        buffers: position tables as the parts hold them, by the released model's names.
        vocoder: the vocoder's file.
        notes: what a user should know, a line each.
    """

    config: OmniConfig
    jobs: list[ConversionJob]
    drawn: dict[str, dict[str, TensorInfo]]
    parent: Parent
    vocabulary: TextVocabulary | None
    buffers: dict[str, np.ndarray]
    vocoder: Path | None
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all parameters that are written."""
        drawn = sum(info.nbytes for leaves in self.drawn.values() for info in leaves.values())
        return drawn + sum(job.plan.nbytes for job in self.jobs)


def plan_from_parts(
    parts: PublicParts,
    base: OmniConfig,
    *,
    read_vocabulary: Callable[[Path, int], TextVocabulary] | None = None,
    branches: Iterable[str] = (),
) -> PartsPlan:
    """Plans a checkpoint: reads every header and configuration, and of the tensors Whisper's positions alone.

    Args:
        parts: the folders.
        base: the sizes of what no part gives.
        read_vocabulary: reads the tokenizer of the language model's folder for a table of so many rows (of a data
            pipeline, which this package does not know); needed with a language model.
        branches: those that are written; default: all of the model, and the vocoder where it is given.

    Raises:
        ConfigError: names the file, and the field or the first tensors that do not fit.
    """
    written = tuple(branches) or MODEL_BRANCHES
    # Sizes first, of all parts together: each part's tables depend on the widths of the others.
    cfg, vocabulary, tied = read_sizes(parts, base, read_vocabulary)
    notes, buffers, jobs = [], {}, {}
    if parts.llm is not None:
        jobs["llm"] = plan_llm(parts.llm, cfg, vocabulary, tied, notes)
    if parts.vision is not None:
        jobs["vision"] = plan_vision(parts.vision, cfg, notes)
    if parts.whisper is not None:
        jobs["audio_encoder"] = plan_whisper(parts.whisper, cfg, buffers)
    for name in jobs:
        if name not in written:
            raise ConfigError(f"branch {name} comes from a part, but --branches leaves it out")
    # The vocoder is a branch that is there or not: nothing of it is drawn.
    drawn = _plan_drawn(cfg, jobs, written)
    if parts.vocoder is not None:
        jobs[VOCODER_BRANCH] = plan_vocoder(parts.vocoder, cfg)
    homes = {"llm": parts.llm, "vision": parts.vision, "audio_encoder": parts.whisper, VOCODER_BRANCH: parts.vocoder}
    parent = Parent(
        checkpoints={name: str(path.resolve()) for name, path in homes.items() if path is not None},
        random=list(_prefixes(drawn, jobs)),
    )
    return PartsPlan(
        config=cfg,
        jobs=list(jobs.values()),
        drawn=drawn,
        parent=parent,
        vocabulary=vocabulary,
        buffers=buffers,
        vocoder=parts.vocoder,
        notes=notes,
    )


def _plan_drawn(
    cfg: OmniConfig, jobs: Mapping[str, ConversionJob], written: Iterable[str]
) -> dict[str, dict[str, TensorInfo]]:
    """Lists the parameters that no part gives, in the dtype of the first part: bf16, or else fp32."""
    first = next((info for job in jobs.values() for info in job.plan.tensors.values()), None)
    kind = first.dtype if first and first.dtype.name == "bfloat16" else np.dtype(np.float32)
    drawn = {}
    for branch in written:
        given = jobs[branch].plan.leaves[branch] if branch in jobs else {}
        variables = named_variables(abstract_branches(cfg, only=[branch])[branch])
        drawn[branch] = {name: TensorInfo(tuple(v.shape), kind) for name, v in variables.items() if name not in given}
    return drawn


def _prefixes(drawn: Mapping[str, Mapping[str, TensorInfo]], jobs: Mapping[str, ConversionJob]) -> Iterator[str]:
    """Names what is random: whole branches, or the parts of a branch whose other parts are given."""
    for branch, leaves in drawn.items():
        if branch not in jobs:
            yield branch
        else:
            yield from dict.fromkeys(f"{branch}.{name.partition('.')[0]}" for name in leaves)


def describe_parts(plan: PartsPlan, *, rules: bool = False) -> str:
    """Describes a plan: a line a part, what is random and how much of it, and what else a user should know."""
    lines = [describe_plan(job.plan, rules=rules) for job in plan.jobs]
    for prefix in plan.parent.random:
        branch, _, inner = prefix.partition(".")
        infos = [info for name, info in plan.drawn[branch].items() if not inner or name.startswith(f"{inner}.")]
        count = sum(info.nbytes // info.dtype.itemsize for info in infos)
        lines.append(f"{prefix}: random, {count:,} values of {infos[0].dtype.name}")
    return "\n".join([*lines, *plan.notes])


def convert_from_parts(plan: PartsPlan, target: Path, *, advance: Advance = lambda done: None) -> None:
    """Writes the checkpoint of branches that `plan` describes, whole or not at all.

    Args:
        plan: what `plan_from_parts` made.
        target: the checkpoint to write; a folder that is not there, or empty.
        advance: called with the bytes that are done, for a progress bar.

    Raises:
        ConfigError: something given cannot be used; nothing is left behind.
    """
    check_target(target)
    with staged_folder(target) as folder:
        lines: dict[str, BranchInfo] = {}
        by_branch = {branch: job for job in plan.jobs for branch in job.plan.entries}
        for branch in dict.fromkeys((*plan.drawn, *by_branch)):
            lines |= _write_branch(folder, branch, plan, by_branch.get(branch), advance)
        _write_texts(folder, plan, lines)
        # Last, as they cover all the others.
        write_checksums(folder)


def _write_branch(
    folder: Path, branch: str, plan: PartsPlan, job: ConversionJob | None, advance: Advance
) -> dict[str, BranchInfo]:
    """Writes a branch: what its part gives, then what is drawn; returns its line of `branches.json`."""
    drawn = plan.drawn.get(branch, {})
    leaves = (job.plan.leaves[branch] if job else {}) | drawn
    sizes = vocoder_sizes(plan.vocoder) if plan.vocoder else None
    variables = named_variables(abstract_branches(plan.config, sizes, only=[branch])[branch])
    # The whole table says which axes are layers, of given and drawn parameters alike.
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    entries, problems = expand(branch_rules(plan.config, sizes)[branch], shapes, branch)
    assert not problems, problems
    depth = stacked_axes(entries)
    writer = BranchWriter(folder / branch_folder(branch), leaves, depth)
    if job:
        write_entries(writer, branch, job, advance)
    # What no part gives, as the module's constructor would draw it.
    for name, info in drawn.items():
        for index, value in draw(f"{branch}.{name}", info, variables[name].moments, depth[name]):
            writer.write(name, index, value)
            advance(value.nbytes)
    writer.close()
    return describe(Plan(leaves={branch: leaves}))


def draw(
    name: str, info: TensorInfo, moments: tuple[float, float], depth: int
) -> Iterator[tuple[tuple[int | slice, ...], np.ndarray]]:
    """Draws a parameter's first values, by layers and blocks of rows.

    Args:
        name: the parameter's, with its branch: it decides the values.
        info: its shape and dtype.
        moments: mean and standard deviation.
        depth: how many leading axes are layers.

    Returns:
        Index and values of each block.
    """
    mean, std = moments
    # A codebook's running sums begin as its codes.
    seed = zlib.crc32(name.replace(".embed_avg", ".embed").encode())
    generator = np.random.Generator(np.random.SFC64([_SEED, seed]))
    for index in np.ndindex(*info.shape[:depth]):
        for rows in blocks_of(info.shape[depth:], 4):
            shape = (rows.stop - rows.start, *info.shape[depth + 1 :])
            value = np.full(shape, mean, np.float32)
            if std:
                value += np.float32(std) * generator.standard_normal(shape, np.float32)
            yield (*index, rows), value.astype(info.dtype)


def _write_texts(folder: Path, plan: PartsPlan, lines: Mapping[str, BranchInfo]) -> None:
    """Writes the small files: buffers, configurations, tokenizer, sources, and last what makes it a checkpoint."""
    # Position tables as Whisper held them, others as they are computed, in the dtype of what is random.
    rules = {rule.tensor: rule for rules in branch_rules(plan.config).values() for rule in rules if rule.restore}
    kind = next((info.dtype for leaves in plan.drawn.values() for info in leaves.values()), np.dtype(np.float32))
    held = {name: rule.restored().astype(kind) for name, rule in rules.items() if name not in plan.buffers}
    save_buffers(folder, _Arrays("the parts", held | plan.buffers), rules)
    dtype = _stated_dtype(plan)
    (folder / CONFIG).write_text(json.dumps(to_hf(plan.config) | {"torch_dtype": dtype}, indent=2))
    if plan.vocoder is not None:
        (folder / VOCODER_CONFIG).write_text(json.dumps(vocoder_to_json(vocoder_sizes(plan.vocoder)), indent=1))
    if plan.vocabulary is not None:
        (folder / PROCESSOR).mkdir()
        (folder / PROCESSOR / "tokenizer.json").write_text(plan.vocabulary.tokenizer_json, encoding="utf-8")
    (folder / PARENT).write_text(json.dumps(asdict(plan.parent), indent=1))
    (folder / BRANCHES_FILE).write_text(json.dumps({name: asdict(line) for name, line in lines.items()}, indent=2))


def _stated_dtype(plan: PartsPlan) -> str:
    """Returns what `config.json` gives as the dtype: that of the first part, or of what is random."""
    given = (info for job in plan.jobs for info in job.plan.tensors.values())
    drawn = (info for leaves in plan.drawn.values() for info in leaves.values())
    return next((info.dtype.name for infos in (given, drawn) for info in infos), "float32")


@dataclass(frozen=True)
class _Arrays:
    """Arrays in memory as a source of tensors."""

    location: str
    arrays: Mapping[str, np.ndarray]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(value.shape, value.dtype) for name, value in self.arrays.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns an array, or some rows of it."""
        return self.arrays[name][slice(None) if rows is None else rows]
