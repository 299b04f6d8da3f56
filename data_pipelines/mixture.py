"""The one endless stream of documents: every source shuffled anew each epoch, sources interleaved by weight."""

import grain
import numpy as np

from baichuan_omni_jax.config import ConfigError
from data_pipelines.index import Index

DocumentKey = tuple[int, int]


def document_stream(
    indexes: list[Index], weights: list[float], seed: int, *, epochs: int | None = None
) -> grain.MapDataset:
    """Random access to (source number, document number) by place in the stream; the same on every host.

    Shares are of documents: after n documents, source i has given n * weight_i / sum(weights), to the nearest one.
    With `epochs` every source is read that many times, one source after the other: for looking at a whole data set.
    Raises ConfigError for a source without usable documents or a weight that is not positive.
    """
    for index, weight in zip(indexes, weights, strict=True):
        if not len(index):
            raise ConfigError(f"source {index.name} ({index.manifest}) has no usable document: {_why(index)}")
        if weight <= 0:
            raise ConfigError(f"source {index.name}: weight {weight} must be positive")
    sources = [_shuffled(number, len(index), seed, epochs) for number, index in enumerate(indexes)]
    if epochs is not None:
        return grain.MapDataset.concatenate(sources)
    return grain.MapDataset.mix(sources, weights)


def _shuffled(source: int, documents: int, seed: int, epochs: int | None) -> grain.MapDataset:
    own_seed = int(np.random.SeedSequence([seed, source]).generate_state(1)[0])
    keys = grain.MapDataset.range(documents).map(lambda number: (source, number))
    return keys.shuffle(seed=own_seed).repeat(epochs)


def _why(index: Index) -> str:
    causes = ", ".join(f"{count} {cause}" for cause, count in index.causes().most_common())
    return f"skipped {causes}" if causes else "it is empty"
