"""From a `DataConfig` to steps of packed rows: tokenizer, processor, indexes, codes and plan, put together."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from baichuan_omni_jax.config import DataConfig, OmniConfig, SourceConfig, TrainConfig
from baichuan_omni_jax.config.loss_shares import LossShare, predict_shares
from baichuan_omni_jax.config.mel_targets import MelTargetSpec
from baichuan_omni_jax.config.overrides import check_types
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.terms import row_cost
from baichuan_omni_jax.storage import is_url, parse_path, patiently
from data_pipelines.datasets.buckets import cache_folder, fetch_shared, share, upload
from data_pipelines.datasets.sources import Source, open_source
from data_pipelines.documents.media_items import Codes
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError, describe_causes, file_errors
from data_pipelines.packing.batch import check_context, context_plan
from data_pipelines.packing.index import Index, Skipped, load_index
from data_pipelines.packing.mixture import Mixture, check_loss_weights, epochs_read, source_means
from data_pipelines.packing.oversize import check_policies, with_pieces
from data_pipelines.packing.packer import Packer, RowPlan, check_plan
from data_pipelines.packing.row_decoder import RowDecoder, Step
from data_pipelines.packing.row_limits import budget_vector, check_media_shards, mel_slots, patch_layout
from data_pipelines.packing.rows import ALL_ROWS, RowShard, StepDataset, read_steps, worker_count
from data_pipelines.packing.step_plan import StepPlan, check_format
from data_pipelines.tokenizers.tokenizer import load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)
NAMED = 1000  # skipped documents of a source that the log names; the others are named in the index's file


@dataclass(frozen=True)
class Pipeline:
    """An indexed mixture, ready to be packed. Nothing of its media has been decoded yet."""

    config: DataConfig
    omni: OmniConfig  # the model's sizes
    processor: Processor  # measures and encodes documents
    indexes: tuple[Index, ...]  # of the sources, in their order
    # Mels that batches hold beside mel slots, by name.
    targets: Mapping[str, MelTargetSpec] = field(default_factory=dict)
    weighting: str = "token"  # what documents count in the loss (`train.document_weighting`)
    untrained_targets: tuple[int, ...] = ()  # special tokens that no loss asks for

    @property
    def cache(self) -> Path:
        return cache_folder(self.config)

    @property
    def skipped(self) -> Iterator[Skipped]:
        return (item for index in self.indexes for item in index.skipped)

    @property
    def documents(self) -> int:
        """Manifest lines or records, usable or not."""
        return sum(index.documents for index in self.indexes)

    def causes(self) -> Counter:
        """Tells how many documents are skipped, by cause."""
        return sum((index.causes() for index in self.indexes), Counter())

    def handled(self) -> Counter:
        """Tells how many documents beyond a budget were made to fit, by policy."""
        return sum((index.pieces.handled for index in self.indexes), Counter())

    def fingerprint(self) -> dict[str, str]:
        """Returns what decides the order and content of rows, by name: hosts whose rows belong together have
        the same.
        """
        parts = {"the tokenizer and processor": self.processor.fingerprint}
        for index in self.indexes:
            parts[f"the documents of {index.manifest}"] = f"{index.usable} documents {index.digest}"
        return parts

    def loss_shares(self, train: TrainConfig) -> list[LossShare]:
        """Tells which share of the loss each source has in training."""
        sources = zip(self.indexes, self.config.mixture, strict=True)
        means = [source_means(index, source, self.weighting) for index, source in sources]
        return predict_shares(means, self.config.weights_by, train)

    def plan(self, *, epochs: int | None = None, resume_state: Mapping | None = None) -> RowPlan:
        """Plans the rows: endless by the mixture's weights, or `epochs` times every document.

        With `resume_state`, the state of another run's data, each source continues where that run left it. Raises
        ConfigError when it is of another version.
        """
        config = self.config
        # The stream of documents, then rows of them; both on every host alike.
        weights = [source.weight for source in config.mixture]
        mixture = Mixture(self.indexes, weights, config.seed, counted=config.weights_by, epochs=epochs)
        if resume_state is not None:
            check_format(resume_state)
            for name in mixture.continue_from(resume_state["sources"]):
                log.warning("source %s starts anew: the run before had none of this name, documents and seed", name)
        budgets = budget_vector(config.budgets).tolist()
        return RowPlan(mixture, Packer(budgets, patch_layout(config), config.open_bins, config.look_ahead))

    def step_plan(self, *, epochs: int | None = None, resume_state: Mapping | None = None) -> StepPlan:
        """Plans the rows of `plan` in steps of `config.rows`."""
        config = self.config
        plan = self.plan(epochs=epochs, resume_state=resume_state)
        return StepPlan(plan, config.rows, config.order_window, row_cost(self.omni), config.seed)

    def decoder(self, codes: Codes | None, context_shards: int = 1) -> RowDecoder:
        """Makes what turns planned rows into batches. Raises ConfigError when rows cannot be dealt to the shards."""
        layout, context = patch_layout(self.config), context_plan(self.config, context_shards)
        mels = mel_slots(self.config, self.omni.audio, self.targets)
        return RowDecoder(
            self.indexes,
            self.processor,
            codes,
            self.config.budgets,
            self.omni,
            layout,
            context,
            mels,
            tuple(source.loss_weight for source in self.config.mixture),
            self.weighting,
            self.untrained_targets,
        )

    def steps(
        self,
        codes: Codes | None,
        *,
        state: dict | None = None,
        shard: RowShard = ALL_ROWS,
        epochs: int | None = None,
        resume_state: Mapping | None = None,
        context_shards: int = 1,
    ) -> Iterator[Step]:
        """Yields steps of `config.rows` rows in all, this host's decoded.

        Args:
            codes: the store of audio codes; None: zeros, to be filled in by a tokenizer in the step.
            state: the plan's state to go on from; None: from the start.
            shard: which rows of every step this host decodes.
            epochs: as in `plan`.
            resume_state: as in `plan`, where there is no `state`.
            context_shards: the mesh's `context`: tokens come dealt to so many; rows have the same documents with any.

        Raises:
            ConfigError: rows cannot be dealt to so many.
        """
        # Workers make the plan themselves: it is cheap, and its state travels with each step.
        plan = partial(self.step_plan, epochs=epochs, resume_state=resume_state if state is None else None)
        decoder, workers = self.decoder(codes, context_shards), worker_count(self.config)
        steps = read_steps(StepDataset(plan, decoder, replace(shard, agreement=None), state), workers)
        # Without workers nothing would be gained by reading ahead.
        return shard.agree(steps, decoder, ahead=min(workers, 1))


class TrainingData:
    """A mixture as the training loop reads it: endless steps from a state on, and counts for the report.

    `handled` counts the documents beyond a budget that a policy made fit.

    Args:
        pipeline: the mixture.
        codes: the store of audio codes, where the run needs them.
        shard: this host's part of every step.
        context_shards: how many shards tokens are dealt to.
        resume_state: the last state of another run's data: each source continues where that run left it.

    Raises:
        ConfigError: rows cannot be dealt to so many shards.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        codes: Codes | None,
        shard: RowShard,
        context_shards: int = 1,
        resume_state: dict | None = None,
    ):
        check_context(pipeline.config, context_shards)
        self._pipeline, self._codes, self._shard, self._context_shards = pipeline, codes, shard, context_shards
        self._resume_state = resume_state
        self.documents = pipeline.documents
        self.skipped = pipeline.causes()
        self.handled = pipeline.handled()
        self.tokenizer_json = pipeline.processor.tokenizer.to_str()
        self.sources = tuple(source.name for source in pipeline.config.mixture)

    def location(self, source: int, number: int) -> str:
        """Returns the manifest line of a document."""
        return self._pipeline.indexes[source].location(number)

    def loss_shares(self, train: TrainConfig) -> list[LossShare]:
        """Tells which share of the loss each source has, as foreseen from the index."""
        return self._pipeline.loss_shares(train)

    def steps(self, state: dict | None) -> Iterator[Step]:
        """Yields steps from the plan's `state` on (None: from the start)."""
        options = {"shard": self._shard, "context_shards": self._context_shards, "resume_state": self._resume_state}
        return self._pipeline.steps(self._codes, state=state, **options)

    def first_rows(self, count: int) -> list[list[int]]:
        """Returns how many tokens each document of the first rows of the plan has, in order."""
        rows = islice(self._pipeline.plan(resume_state=self._resume_state), count)
        return [[document.lengths[0] for document in row] for row in rows]

    def epochs(self, state: dict) -> dict[str, float]:
        """Tells how often each source has been read when the plan's state is this one."""
        return epochs_read(state["sources"])

    def check_failed(self, causes: Counter) -> None:
        """Raises ConfigError when documents skipped by the index and lost at decode exceed `max_bad_fraction`."""
        bad = self.skipped + causes
        check_bad_fraction(bad.total(), self.documents, self._pipeline.config.max_bad_fraction, bad)


def open_pipeline(
    config: DataConfig,
    omni: OmniConfig,
    processor: Processor | None = None,
    targets: Mapping[str, MelTargetSpec] | None = None,
    weighting: str = "token",
    untrained_targets: tuple[int, ...] = (),
) -> Pipeline:
    """Opens tokenizer, processor and indexes of a mixture; every skipped document is named in the log, once.

    Args:
        config: sources, budgets, policies and paths.
        omni: the model's sizes.
        processor: what documents go through; held-out documents need the tokenizer of the training run. None: the
            configuration's own.
        targets: mels that batches hold beside mel slots, by name.
        weighting: what documents count in the loss (`train.document_weighting`).
        untrained_targets: special tokens that no loss asks for.

    Returns:
        The pipeline; nothing of its media has been decoded yet.

    Raises:
        ConfigError: a missing manifest or tokenizer, a source with nothing usable, patches that `media_shards` does not
            divide, more unusable documents than `max_bad_fraction`, or a cache that cannot be written.
    """
    if not config.mixture:
        raise ConfigError("data.mixture is empty: name at least one source")
    # Everything that arithmetic can refuse, before a file is opened.
    check_media_shards(config, omni)
    check_plan(config)
    check_policies(config)
    check_loss_weights(config)
    mel_slots(config, omni.audio, targets)
    with file_errors(cache_folder(config)):
        if processor is None:
            tokenizer = load_or_train_tokenizer(config, omni)
            processor = Processor(omni, tokenizer, config.end_of_text, config.images, config.unmarked)
        indexes = tuple(_open_index(config, source, processor) for source in config.mixture)
    pipeline = Pipeline(config, omni, processor, indexes, targets or {}, weighting, untrained_targets)
    for index in indexes:
        _name_skipped(index)
    bad = pipeline.causes()
    check_bad_fraction(bad.total(), pipeline.documents, config.max_bad_fraction, bad)
    pipeline.plan()  # refuses empty sources and bad weights here, not later in a worker
    check_types(config, "data.")
    return pipeline


def _open_index(config: DataConfig, source: SourceConfig, processor: Processor) -> Index:
    # Measured once, whatever the budgets; then cut down to these budgets; then what is too long made to fit.
    index = load_index(config, source, processor, worker_count(config))
    index = index.within(config.budgets, config.media_shards)
    policies = config.oversize if source.oversize is None else source.oversize
    return with_pieces(index, policies, processor, cache_folder(config), worker_count(config))


def _name_skipped(index: Index) -> None:
    if causes := index.causes():
        log.warning("source %s: %d of %d documents are skipped", index.name, causes.total(), index.documents)
        for line in describe_causes(causes, index.examples()):
            log.warning("source %s: %s", index.name, line)
    for item in islice(index.skipped, NAMED):
        log.warning("skipped %s (%s): %s", item.location, item.cause, item.message)
    more = index.causes().total() - NAMED
    if more > 0:
        log.warning("%s: %d more documents are skipped; %s names the unusable", index.name, more, index.skipped_file)


def check_bad_fraction(bad: int, documents: int, limit: float, causes: Counter) -> None:
    """Refuses more unusable documents than `data.max_bad_fraction` allows.

    Args:
        bad: how many are unusable.
        documents: how many there are.
        limit: the share that is allowed.
        causes: how many by cause, for the message.

    Raises:
        ConfigError: there are more.
    """
    if bad > limit * documents:
        named = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        raise ConfigError(
            f"{bad} of {documents} documents are unusable ({named}), more than data.max_bad_fraction {limit:g}"
        )


def load_or_train_tokenizer(config: DataConfig, omni: OmniConfig) -> Tokenizer:
    """Loads `config.tokenizer`, or trains a byte-level BPE on the manifests' text, cached under what it was
    trained on.
    """
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    # The name tells what it was trained on, so another mixture trains another one.
    texts = [text for source in config.mixture for text in _texts(open_source(config, source))]
    key = hashlib.sha256("\0".join([str(omni.llm.vocab_size), *texts]).encode()).hexdigest()[:16]
    path = cache_folder(config) / f"tokenizer-{key}.json"
    fetch_shared(config, path)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}.partial")
        train_tokenizer(texts, omni.llm.vocab_size).save(str(partial_path))
        partial_path.replace(path)
        share(config, path)
    return load_tokenizer(path)


def _texts(source: Source) -> Iterator[str]:
    """Yields the text between media; what is no document is counted when it is indexed."""
    for part in source.parts:
        for entry in source.read(cast(Any, part)):  # a source reads its own kind of parts
            if isinstance(entry.document, SampleError):
                continue
            try:
                elements = parse_prompt(entry.document.text)
            except SampleError:
                continue
            yield from (element.text for element in elements if isinstance(element, TextElement))


def prepare_sample(config: DataConfig) -> None:
    """Builds the offline sample data set at `config.root` when the config asks for it and it is not there yet."""
    if config.sample:
        # Needs the `sample` extra, so only where it is asked for.
        from data_pipelines.sample.__main__ import SUMMARY, build_sample

        root = parse_path(config.root)
        if not is_url(root):
            build_sample(Path(root))
        elif not patiently((root / SUMMARY).exists, f"looking for {root / SUMMARY}", config.patience):
            upload(build_sample(cache_folder(config) / "sample"), root, SUMMARY, config.patience)
