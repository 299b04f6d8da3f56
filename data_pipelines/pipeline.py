"""From a `DataConfig` to steps of packed rows: tokenizer, processor, indexes, codes and plan, put together."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from baichuan_omni_jax.config import ConfigError, DataConfig, OmniConfig
from data_pipelines.codes import CodeKey
from data_pipelines.context_plan import context_plan
from data_pipelines.document import SampleError
from data_pipelines.index import COLUMNS, Index, Skipped, budget_vector, load_index
from data_pipelines.manifest import read_manifest
from data_pipelines.media_layout import check_media_shards, patch_layout
from data_pipelines.mixture import document_stream
from data_pipelines.processor import AudioItem, Codes, Processor
from data_pipelines.prompts import Text, parse_prompt
from data_pipelines.row_plan import RowPlan
from data_pipelines.rows import ALL_ROWS, RowDecoder, Shard, Step, StepDataset, read_steps
from data_pipelines.tokenizing import load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)
_WINDOWS = COLUMNS.index("mel_windows")


@dataclass(frozen=True)
class Pipeline:
    """An indexed mixture, ready to be packed. Nothing of its media has been decoded yet."""

    config: DataConfig
    omni: OmniConfig
    processor: Processor
    indexes: tuple[Index, ...]

    @property
    def cache(self) -> Path:
        return cache_folder(self.config)

    @property
    def skipped(self) -> list[Skipped]:
        return [item for index in self.indexes for item in index.skipped]

    @property
    def documents(self) -> int:
        """Manifest lines, usable or not."""
        return sum(len(index) + len(index.skipped) for index in self.indexes)

    def causes(self) -> Counter:
        return sum((index.causes() for index in self.indexes), Counter())

    def fingerprint(self) -> dict[str, str]:
        """What decides the order and content of rows, by name: hosts whose rows belong together have the same."""
        parts = {"the tokenizer and processor": self.processor.fingerprint}
        for index in self.indexes:
            digest = hashlib.sha256(index.lengths.tobytes() + index.offsets.tobytes() + index.lines.tobytes())
            parts[f"the documents of {index.manifest}"] = f"{len(index)} documents {digest.hexdigest()[:12]}"
        return parts

    def audio_items(self) -> Iterator[AudioItem]:
        """Every window of sound in the mixture, once, in manifest order.

        A document whose media changed since it was indexed is passed over: decoding it tells.
        """
        seen = set()
        for index in self.indexes:
            for number in range(len(index)):
                if index.lengths[number][_WINDOWS]:
                    for key, item in self._keyed_audio(index, number):
                        if key not in seen:
                            seen.add(key)
                            yield item

    def _keyed_audio(self, index: Index, number: int) -> list[tuple[CodeKey, AudioItem]]:
        try:
            return [(item.key, item) for item in self.processor.audio_items(index.document(number))]
        except SampleError as error:
            log.debug("%s:%d has no sound to tokenise: %s", index.manifest, index.lines[number], error)
            return []

    def plan(self, *, epochs: int | None = None) -> RowPlan:
        """The row plan: endless by the mixture's weights, or `epochs` times every document."""
        stream = document_stream(
            list(self.indexes), [source.weight for source in self.config.mixture], self.config.seed, epochs=epochs
        )
        needs = lambda source, number: self.indexes[source].needs(number)  # noqa: E731
        pictures = lambda source, number: self.indexes[source].pictures_of(number)  # noqa: E731
        budgets = budget_vector(self.config.budgets)
        return RowPlan(stream, needs, pictures, budgets, patch_layout(self.config), self.config.open_bins)

    def decoder(self, codes: Codes, context_shards: int = 1) -> RowDecoder:
        """What turns planned rows into batches. Raises ConfigError when rows cannot be dealt to the shards."""
        layout, context = patch_layout(self.config), context_plan(self.config, context_shards)
        return RowDecoder(self.indexes, self.processor, codes, self.config.budgets, self.omni, layout, context)

    def steps(
        self,
        codes: Codes,
        *,
        state: dict | None = None,
        shard: Shard = ALL_ROWS,
        epochs: int | None = None,
        context_shards: int = 1,
    ) -> Iterator[Step]:
        """Steps of `config.rows` rows in all, this host's decoded, from `state` on.

        Tokens come dealt to `context_shards`, the mesh's `context`; which documents share a row does not depend on it.
        Raises ConfigError when rows cannot be dealt to so many.
        """
        plan = partial(self.plan, epochs=epochs)
        dataset = StepDataset(plan, self.decoder(codes, context_shards), self.config.rows, shard, state)
        return read_steps(dataset, self.config.workers)


def open_pipeline(config: DataConfig, omni: OmniConfig, processor: Processor | None = None) -> Pipeline:
    """Tokenizer, processor and indexes of a mixture; every skipped document is named in the log, once.

    With `processor` the documents go through that one: held-out documents need the tokenizer of the training run.
    Raises ConfigError for a missing manifest or tokenizer, a source with nothing usable, patches that `media_shards`
    does not divide, or more unusable documents than `max_bad_fraction`.
    """
    if not config.mixture:
        raise ConfigError("data.mixture is empty: name at least one source")
    check_media_shards(config, omni)
    root = Path(config.root).expanduser()
    processor = processor or Processor(omni, load_or_train_tokenizer(config, omni), config.end_of_text)
    whole = [load_index(each.name, each.manifest, root, processor, cache_folder(config)) for each in config.mixture]
    indexes = tuple(index.within(config.budgets, config.media_shards) for index in whole)
    pipeline = Pipeline(config, omni, processor, indexes)
    for item in pipeline.skipped:
        log.warning("skipped %s (%s): %s", item.where, item.cause, item.message)
    check_bad_fraction(len(pipeline.skipped), pipeline.documents, config.max_bad_fraction, pipeline.causes())
    pipeline.plan()  # refuses empty sources and bad weights here, not later in a worker
    return pipeline


def check_bad_fraction(bad: int, documents: int, limit: float, causes: Counter) -> None:
    """Raises ConfigError when more than `limit` of all documents are unusable."""
    if bad > limit * documents:
        named = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
        raise ConfigError(
            f"{bad} of {documents} documents are unusable ({named}), more than data.max_bad_fraction {limit:g}"
        )


def cache_folder(config: DataConfig) -> Path:
    """Where tokenizer, indexes and codes of a data set are kept."""
    return Path(config.root).expanduser() / ".cache"


def load_or_train_tokenizer(config: DataConfig, omni: OmniConfig) -> Tokenizer:
    """`config.tokenizer`, or a byte-level BPE trained on the manifests' text, cached under what it was trained on."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    root = Path(config.root).expanduser()
    texts = [text for source in config.mixture for text in _texts(source.manifest, root)]
    key = hashlib.sha256("\0".join([str(omni.llm.vocab_size), *texts]).encode()).hexdigest()[:16]
    path = cache_folder(config) / f"tokenizer-{key}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}.partial")
        train_tokenizer(texts, omni.llm.vocab_size).save(str(partial_path))
        partial_path.replace(path)
    return load_tokenizer(path)


def _texts(manifest: str, root: Path) -> Iterator[str]:
    """The text between media; lines that are no document are counted when they are indexed."""
    for line in read_manifest(manifest, root):
        if isinstance(line.document, SampleError):
            continue
        try:
            elements = parse_prompt(line.document.text)
        except SampleError:
            continue
        yield from (element.text for element in elements if isinstance(element, Text))


def prepare_sample(config: DataConfig) -> None:
    """Builds the offline sample data set at `config.root` when the config asks for it and it is not there yet."""
    if config.sample:
        from data_pipelines.sample import build_sample  # needs the `sample` extra, so only where it is asked for

        build_sample(Path(config.root).expanduser())
