"""A held-out mixture: its rows, its documents with the media of others, and its documents as questions.

Whether a model uses what it is shown is told by the same documents twice: as they are, and with the media of another
document of the same source and kind (`documents.questions`). Both go through the row format of training.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from jaxtyping import Int32

from data_pipelines.documents.document import Document, EncodedDocument, Lengths
from data_pipelines.documents.media_items import Codes
from data_pipelines.documents.questions import (
    Exchangeable,
    Question,
    exchange,
    find_exchangeable,
    pair_up,
    read_question,
    recognition_prompt,
)
from data_pipelines.errors import SampleError
from data_pipelines.packing.index import Index
from data_pipelines.packing.packer import Packer
from data_pipelines.packing.row_decoder import RowDecoder, Step
from data_pipelines.packing.row_limits import (
    DocumentKey,
    DocumentLengths,
    RowLimits,
    budget_lengths,
    budget_vector,
    patch_layout,
)
from data_pipelines.packing.rows import RowShard, decode_step
from data_pipelines.pipeline import Pipeline, TrainingData

log = logging.getLogger(__name__)

FEW_STEPS = 8  # of an evaluation: so many are decoded sooner than worker processes start


@dataclass(frozen=True)
class MeasuredDocuments:
    """Documents that are at hand, with their lengths, by number: what `RowDecoder` reads of an index."""

    found: dict[int, tuple[Document, Lengths]]

    def document(self, number: int) -> Document:
        return self.found[number][0]

    def location(self, number: int) -> str:
        return self.document(number).location

    def lengths(self, number: int) -> Int32[np.ndarray, "budgets"]:
        return np.asarray(budget_lengths(self.found[number][1]), np.int32)

    def image_patches(self, number: int) -> list[int]:
        return list(self.found[number][1].image_patches)

    remote = False  # read already

    def fetch(self, number: int) -> None:
        """Does nothing: the documents are in memory."""


@dataclass(frozen=True)
class ExchangedMedia:
    """The same documents as they are and exchanged; each call reads their steps anew.

    Source 2 n of a batch are documents of the mixture's source n whose media are exchanged, source 2 n + 1 those whose
    spoken text is. `left_out` counts by cause the documents that nothing could be exchanged of.
    """

    own: Callable[[], Iterator[Step]]
    exchanged: Callable[[], Iterator[Step]]
    left_out: Counter


class HeldOutMixture(TrainingData):
    """Held-out documents as rows (`steps`), with exchanged media, and as questions.

    Args:
        pipeline: the mixture.
        codes: the store of audio codes, where the run needs them.
        shard: this host's part of every step.
        context_shards: how many shards tokens are dealt to.
        workers: processes that decode rows; None: as many as for training. Starting one costs more than a few steps.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        codes: Codes | None,
        shard: RowShard,
        context_shards: int = 1,
        workers: int | None = None,
    ):
        if workers is not None:
            pipeline = replace(pipeline, config=replace(pipeline.config, workers=workers))
        super().__init__(pipeline, codes, shard, context_shards)
        self._exchanged: dict[int, ExchangedMedia] = {}

    def exchanged_media(self, steps: int) -> ExchangedMedia:
        """Plans the documents of the first `steps` steps with and without exchanged media; reads them for that once."""
        if steps not in self._exchanged:
            self._exchanged[steps] = self._plan_exchange(steps)
        return self._exchanged[steps]

    def _plan_exchange(self, steps: int) -> ExchangedMedia:
        # Documents of these steps, each once, in the order of their numbers.
        planned = islice(self._pipeline.step_plan(), steps)
        keys = sorted({key for step in planned for row in step for key in row})
        own, exchanged, left_out = [], [], Counter()
        for source, index in enumerate(self._pipeline.indexes):
            numbers = [number for place, number in keys if place == source]
            media, texts = self._exchange(index, numbers, left_out)
            for pairs in (media, texts):
                own.append(MeasuredDocuments({number: pair[0] for number, pair in pairs.items()}))
                exchanged.append(MeasuredDocuments({number: pair[1] for number, pair in pairs.items()}))
        return ExchangedMedia(self._steps_of(own), self._steps_of(exchanged), left_out)

    def _exchange(self, index: Index, numbers: list[int], left_out: Counter) -> tuple["_Pairs", "_Pairs"]:
        """Exchanges media, and spoken texts, among documents of one source; returns both kinds apart."""
        found: dict[int, tuple[Document, Exchangeable]] = {}
        lost: dict[int, str] = {}
        for number in numbers:
            document = index.document(number)
            try:
                exchangeable = find_exchangeable(document, self._pipeline.processor)
            except SampleError as error:
                lost[number] = error.cause
                continue
            if exchangeable is not None:
                found[number] = document, exchangeable
        # All hosts pair the same documents: what one of them cannot read, none does.
        lost = self._shard.union(lost)
        kinds: dict[tuple[str, ...], list[tuple[int, Document, Exchangeable]]] = {}
        for number, (document, own) in found.items():
            if number not in lost:
                kinds.setdefault(own.kinds, []).append((number, document, own))

        pairs: tuple[_Pairs, _Pairs] = ({}, {})
        for members in kinds.values():
            partners = pair_up([own.contents for _, _, own in members])
            for (number, document, own), partner in zip(members, partners, strict=True):
                if partner is None:
                    lost[number] = "no_other_media"
                    continue
                other = members[partner]
                try:
                    made = exchange(document, own, other[2], other[1])
                    pairs[own.of_text][number] = self._measured(document), self._measured(made)
                except SampleError as error:
                    lost[number] = error.cause
        lost = self._shard.union(lost)
        left_out.update(lost.values())
        media, texts = ({number: pair for number, pair in kind.items() if number not in lost} for kind in pairs)
        return media, texts

    def _measured(self, document: Document) -> tuple[Document, Lengths]:
        """Measures a document. Raises SampleError "too_long" where no row can hold it."""
        config, lengths = self._pipeline.config, self._pipeline.processor.measure(document)
        limits = RowLimits(config.budgets, config.media_shards)
        if why := limits.why_exceeds(budget_lengths(lengths), lengths.image_patches):
            raise SampleError("too_long", why)
        return document, lengths

    def _steps_of(self, documents: list[MeasuredDocuments]) -> Callable[[], Iterator[Step]]:
        """Packs documents into rows and returns what reads the steps of them; the last one is filled up by empty rows.

        Every host makes the same rows and decodes its own.
        """
        config, pipeline = self._pipeline.config, self._pipeline
        packer = Packer(budget_vector(config.budgets).tolist(), patch_layout(config), config.open_bins, 0)
        packed = [packer.add(need) for need in _all_lengths(documents)]
        rows = [row for row in packed if row is not None]
        while (row := packer.finish()) is not None:
            rows.append(row)
        keys: list[list[DocumentKey]] = [[document.key for document in row] for row in rows]
        keys += [[]] * (-len(keys) % config.rows)
        steps = [keys[start : start + config.rows] for start in range(0, len(keys), config.rows)]
        plain = pipeline.decoder(self._codes, self._context_shards)
        # One weight for each source of the batch: a source's own, for both kinds of exchange.
        weights = tuple(weight for weight in plain.loss_weights for _ in range(2))
        decoder = RowDecoder(**vars(plain) | {"indexes": tuple(documents), "loss_weights": weights})
        return lambda: self._shard.agree((decode_step(decoder, self._shard, rows, {}) for rows in steps), decoder)

    def questions(self, source: str, limit: int) -> tuple[list[Question], Counter]:
        """Reads the first `limit` documents of a source as questions; returns also why others are none, counted."""
        index, found, left_out = self._pipeline.indexes[self.sources.index(source)], [], Counter()
        for number in islice(index.numbers(), limit):
            try:
                found.append(read_question(index.document(number), self._pipeline.processor, self._codes))
            except SampleError as error:
                left_out[error.cause] += 1
                log.info("%s cannot be asked (%s): %s", index.location(number), error.cause, error)
        return found, left_out

    def recognition_prompt(self, codes: Int32[np.ndarray, "n q"]) -> EncodedDocument:
        """Encodes the request to transcribe speech of the model's own."""
        return recognition_prompt(codes, self._pipeline.processor)


_Measured = tuple[Document, Lengths]
_Pairs = dict[int, tuple[_Measured, _Measured]]


def _all_lengths(sources: list[MeasuredDocuments]) -> Iterator[DocumentLengths]:
    for source, documents in enumerate(sources):
        for number, (_, lengths) in documents.found.items():
            yield DocumentLengths(number, tuple(budget_lengths(lengths)), list(lengths.image_patches), source)
