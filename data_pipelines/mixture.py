"""The one endless stream of documents: every source shuffled anew each epoch, sources interleaved by weight."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import grain
import numpy as np

from baichuan_omni_jax.config import ConfigError
from data_pipelines.index import Index

DocumentKey = tuple[int, int]


def document_stream(
    indexes: list[Index], weights: Sequence[float | int], seed: int, *, epochs: int | None = None
) -> grain.MapDataset:
    """Random access to (source number, document number) by place in the stream; the same on every host.

    Weights are shares of documents (`Shares`), exact in the long run.
    With `epochs` every source is read that many times, one source after the other: for looking at a whole data set.
    Raises ConfigError for a source without usable documents or a weight that is not positive.
    """
    for index, weight in zip(indexes, weights, strict=True):
        if not len(index):
            raise ConfigError(f"source {index.name} ({index.manifest}) has no usable document: {_why(index)}")
        if not 0 < weight < math.inf:
            raise ConfigError(f"source {index.name}: weight {weight} must be positive")
    sources = [_shuffled(number, len(index), seed, epochs) for number, index in enumerate(indexes)]
    if epochs is not None:
        return grain.MapDataset.concatenate(sources)
    return grain.MapDataset.select_from_datasets(sources, Shares(weights))


class Shares(grain.transforms.DatasetSelectionMap):
    """Which source gives the k-th document, and which of its own documents that is.

    After n documents source i has given n * weight_i / sum(weights), give or take 1 + 1/2 + ... + 1/sources. (Grain's
    own `mix` cuts weights to whole hundredths of the smallest: with 1 and 1.009 it gives equal shares for ever.)

    The heaviest source's count is the rounded-up share of all n, the next one's that of what is left, and so on; the
    k-th document comes from the source whose count grows. With weights 2 and 1: sources 0 0 1, 0 0 1, ...
    """

    def __init__(self, weights: Sequence[float | int]):
        exact = [Fraction(weight) for weight in weights]
        scale = max(weight.denominator for weight in exact)  # all are powers of two
        heaviest_first = sorted(range(len(weights)), key=lambda source: -exact[source])
        self._shares = [(source, int(exact[source] * scale)) for source in heaviest_first]
        self._total = sum(share for _, share in self._shares)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> tuple[int, int]:
        before, after, left = k, k + 1, self._total
        for source, share in self._shares:
            left_before, left_after = (count * (left - share) // left for count in (before, after))
            if before - left_before != after - left_after:
                return source, before - left_before
            before, after, left = left_before, left_after, left - share
        raise AssertionError("the last source takes all that is left")


def _shuffled(source: int, documents: int, seed: int, epochs: int | None) -> grain.MapDataset:
    own_seed = int(np.random.SeedSequence([seed, source]).generate_state(1)[0])
    keys = grain.MapDataset.range(documents).map(lambda number: (source, number))
    return keys.shuffle(seed=own_seed).repeat(epochs)


def _why(index: Index) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in index.causes().most_common())
    return f"skipped {causes}" if causes else "it is empty"
