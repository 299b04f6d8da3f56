"""A step's rows on their way in: what training expects of a data set, and how the rows are split over the mesh.

`check_batch` is what every task asks of a batch, `check_audio_run` and what follows it what rows with mel slots add.
The library imports no data pipeline: `TrainingData` and `DataStep` are what `data_pipelines.packing` provides.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from baichuan_omni_jax.config import OmniConfig, RunConfig, TrainConfig
from baichuan_omni_jax.config.loss_shares import LossShare
from baichuan_omni_jax.config.mel_targets import MelTargetSpec, run_mel_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, abstract_batch
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.hosts import all_gather_str

log = logging.getLogger(__name__)

DocumentKey = tuple[int, int]  # source, number in it
FailedDocuments = dict[DocumentKey, tuple[str, str, str]]  # to manifest line, cause, message
BatchAxes = Mapping[str, tuple[str | None, ...]]


@runtime_checkable
class DataStep(Protocol):
    """A step of data: this host's rows, the documents that failed to decode, and the data's state after it.

    `damaged` counts the packets of a document's media that could not be decoded; the document is used without them.
    """

    @property
    def batch(self) -> dict[str, np.ndarray]: ...

    @property
    def failed(self) -> FailedDocuments: ...

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def damaged(self) -> dict[DocumentKey, int]: ...


@runtime_checkable
class TrainingData(Protocol):
    """A data set: names and counts for the reports, and steps from a state on."""

    documents: int
    skipped: Counter
    handled: Counter
    sources: tuple[str, ...]
    tokenizer_json: str

    def steps(self, state: dict | None) -> Iterator[DataStep]:
        """Yields steps from `state` on (None: from the start). The iterator's `close` ends its workers."""
        ...

    def loss_shares(self, train: TrainConfig) -> Sequence[LossShare]:
        """Predicts the share of the loss that each source has."""
        ...

    def first_rows(self, count: int) -> list[list[int]]:
        """Returns how many tokens each document of the first rows has, in order."""
        ...

    def epochs(self, state: dict) -> dict[str, float]:
        """Counts how often each source has been read when the data's state is this one."""
        ...

    def location(self, source: int, number: int) -> str:
        """Names the manifest line of a document."""
        ...

    def check_failed(self, causes: Counter) -> None:
        """Raises ConfigError when too many documents turned out unusable."""
        ...


class DocumentFailures:
    """Documents that could not be decoded since this start, on all hosts: counted once, named in the log."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data
        self._causes: dict[DocumentKey, str] = {}
        self._unshared: dict[DocumentKey, str] = {}

    @property
    def causes(self) -> Counter:
        """How many documents failed, by cause; those of other hosts up to the last `share_among_hosts`."""
        return Counter(self._causes.values())

    def note(self, failed: FailedDocuments) -> None:
        """Counts a step's documents. Alone, a host raises ConfigError at once when they are too many."""
        for key, (location, cause, message) in failed.items():
            # A document may be read again, by another epoch or after a restart.
            if key not in self._causes:
                self._causes[key] = self._unshared[key] = cause
                log.warning("skipped %s (%s): %s", location, cause, message)
        # On several hosts the limit is checked when failures are shared: all must leave together.
        if failed and jax.process_count() == 1:
            self._data.check_failed(self.causes)

    def share_among_hosts(self) -> None:
        """Tells every host what the others could not decode; all raise alike when it is too much."""
        if jax.process_count() == 1:
            return
        for text in all_gather_str(json.dumps([[*key, cause] for key, cause in self._unshared.items()])):
            self._causes |= {(source, number): cause for source, number, cause in json.loads(text)}
        self._unshared = {}
        self._data.check_failed(self.causes)


def check_batch(run: RunConfig, omni: OmniConfig, mesh: Mesh, rules: ShardingRules) -> None:
    """Raises ConfigError naming the number of the configuration that the mesh, or another number, does not divide."""
    for name, value in {
        "train.accumulate": run.train.accumulate,
        "train.nonfinite_limit": run.train.nonfinite_limit,
        "eval.steps": run.eval.steps,
        "data.media_shards": run.data.media_shards,
        "data.context_block": run.data.context_block,
    }.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    shape, data = mesh.shape, run.data
    # Every part of an accumulated step must have rows on every device.
    parts = {"mesh.data": shape["data"], "mesh.fsdp": shape["fsdp"], "train.accumulate": run.train.accumulate}
    _check_divisible("data.rows", data.rows, parts)
    if shape["context"] > 1:
        parts = {"mesh.context": shape["context"], "data.context_block": data.context_block}
        _check_divisible("data.budgets.tokens", data.budgets.tokens, parts)
    if "vision" in run.branches:
        media = {f"mesh.{axis}": shape[axis] for axis in rules.axes("media")}
        _check_divisible("data.media_shards", data.media_shards, media)
    # The fields' own shapes are checked where they are made.
    abstract_batch(data.rows, data.budgets, omni, run.branches, mesh, rules)


def _check_divisible(name: str, size: int, parts: Mapping[str, int]) -> None:
    product = math.prod(parts.values())
    if size % product:
        named = " x ".join(f"{part} {count}" for part, count in parts.items())
        raise ConfigError(f"{name} {size} is not divisible by {product} ({named})")


def rows_by_host(mesh: Mesh, rules: ShardingRules, rows: int) -> dict[int, tuple[int, ...]]:
    """Lists which of a global batch's `rows` the devices of each host hold a part of, ascending.

    Hosts share rows where `context` or `tensor` spans them: each then decodes them whole.
    """
    # Devices that split other axes hold the same rows.
    found: dict[int, set[int]] = {}
    for device, part in NamedSharding(mesh, rules.spec("batch")).devices_indices_map((rows,)).items():
        found.setdefault(device.process_index, set()).update(range(rows)[part[0]])
    return {host: tuple(sorted(held)) for host, held in sorted(found.items())}


class BatchPlacer:
    """Puts batches on the mesh: the fields of `axes`, split as their logical axes say.

    A call takes this host's rows (`rows_by_host`, in that order, all other axes whole).
    """

    def __init__(self, rows: int, axes: BatchAxes, mesh: Mesh, rules: ShardingRules) -> None:
        self._total = rows
        held = rows_by_host(mesh, rules, rows).get(jax.process_index(), ())
        self._here = {row: place for place, row in enumerate(held)}
        self._shardings = {name: NamedSharding(mesh, rules.spec(*names)) for name, names in axes.items()}

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the global batch."""
        return {name: self._put(batch[name], sharding) for name, sharding in self._shardings.items()}

    def _put(self, value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part_of_device(index: Any) -> np.ndarray:
            # A device's rows are consecutive in the global batch, and so among this host's.
            wanted = range(self._total)[index[0]]
            start = self._here[wanted[0]]
            return value[(slice(start, start + len(wanted)), *index[1:])]

        return jax.make_array_from_callback((self._total, *value.shape[1:]), sharding, part_of_device)


_ROWS = ("llm", "audio_encoder")


def check_audio_run(
    run: RunConfig,
    omni: OmniConfig,
    mesh: Mesh,
    compute: ComputePolicy,
    branches: Sequence[str],
    required: Sequence[str],
) -> None:
    """Raises ConfigError where the configuration does not fit a task that trains on audio.

    Args:
        run: its branches, budgets, accumulation and weights are checked.
        omni: the model's sizes.
        mesh: must divide the batch.
        compute: its rules split the batch.
        branches: those that the task has.
        required: those that it cannot do without.
    """
    # Branches first: the rest makes no sense for others.
    unknown = [name for name in run.branches if name not in branches]
    missing = [name for name in required if name not in run.branches]
    if unknown or missing:
        raise ConfigError(f"branches {', '.join(run.branches)}: task {run.task} has {', '.join(branches)}")
    if run.data.budgets.mel_windows < 1:
        raise ConfigError(f"data.budgets.mel_windows must be at least 1: task {run.task} learns from audio")
    # Codebooks are updated from the whole batch, and the losses are means of frames.
    if run.train.accumulate != 1:
        raise ConfigError(f"train.accumulate must be 1: task {run.task} takes its batch whole")
    if run.train.document_weighting != "token":
        raise ConfigError(f"train.document_weighting must be token: task {run.task} weighs audio by its length")
    for source in run.data.mixture:
        if source.loss_weight != 1:
            raise ConfigError(
                f"source {source.name}: loss_weight must be 1 in task {run.task}, not {source.loss_weight}"
            )
    # Rows and tokens divide as in language stages; then mel slots and targets.
    check_batch(replace(run, branches=_ROWS), omni, mesh, compute.rules)
    abstract_mel_batch(run, omni, mesh, compute.rules)


def mel_batch_axes(targets: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    """Returns the logical axes of the fields of rows with mel slots and these targets."""
    axes = {name: axes for branch in _ROWS for name, axes in BRANCH_FIELDS[branch].items()}
    axes["audio_index"] = BRANCH_FIELDS["audio_head"]["audio_index"]
    for name in targets:
        axes |= {f"target_{name}": ("batch", "media", None, None), f"target_{name}_lengths": ("batch", "media")}
    return axes


def abstract_mel_batch(
    run: RunConfig, omni: OmniConfig, mesh: Mesh, rules: ShardingRules
) -> dict[str, jax.ShapeDtypeStruct]:
    """Describes a batch with the largest slots by shapes and shardings."""
    # A row's own fields, then a slot for each target beside each mel slot.
    data, frames, targets = run.data, mel_slot_frames(run, omni), run_mel_targets(run, omni)
    branches = ("llm", "audio_encoder", "audio_head")
    shapes = abstract_batch(data.rows, data.budgets, omni, branches, mesh, rules, mel_frames=frames)
    slots = (data.rows, data.budgets.mel_windows)
    for name, target in targets.items():
        shapes[f"target_{name}"] = _media((*slots, target_slot_frames(target, frames, omni), target.mels), mesh, rules)
        shapes[f"target_{name}_lengths"] = _media(slots, mesh, rules, jnp.int32)
    return {name: shapes[name] for name in mel_batch_axes(tuple(targets))}


def mel_slot_frames(run: RunConfig, omni: OmniConfig) -> int:
    """Counts the mel frames of the largest slot."""
    return max(run.data.mel_frames, default=omni.audio.max_mel_frames)


def target_slot_frames(target: MelTargetSpec, mel_frames: int, omni: OmniConfig) -> int:
    """Counts the frames of a target's slot beside a mel slot of `mel_frames`."""
    return target.frames(mel_frames * omni.audio.hop_length * target.rate // omni.audio.sampling_rate)


def _media(shape: tuple[int, ...], mesh: Mesh, rules: ShardingRules, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, rules.spec("batch", "media", *[None] * (len(shape) - 2)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
