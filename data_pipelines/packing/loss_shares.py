"""What documents of a source weigh in the loss on average, from the index: shares are known before training."""

import numpy as np
from jaxtyping import Int64

from baichuan_omni_jax.config import DataConfig, SourceConfig
from baichuan_omni_jax.config.loss_shares import POWERS, SourceMeans
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.columns import Columns
from data_pipelines.packing.index import Index
from data_pipelines.packing.row_limits import AUDIO_TARGETS

SAMPLE = 1 << 17  # documents of a source that its means are taken from, evenly spread


def check_loss_weights(config: DataConfig) -> None:
    """Raises ConfigError for a `loss_weight` that is not positive."""
    for source in config.mixture:
        if not 0 < source.loss_weight < np.inf:
            raise ConfigError(f"source {source.name}: loss_weight {source.loss_weight} must be positive")


def source_means(index: Index, source: SourceConfig, weighting: str) -> SourceMeans:
    """Returns what a document or piece of the source has on average, from `SAMPLE` of them at most."""
    tokens, text, audio = _targets(index)
    # 0 targets weigh 0, whatever the power.
    weights = [np.where(count > 0, np.maximum(count, 1) ** (1.0 - POWERS[weighting]), 0.0) for count in (text, audio)]
    means = [float(values.mean()) for values in (tokens, text + audio, *weights)]
    return SourceMeans(source.name, source.weight, *means[:2], *(source.loss_weight * mean for mean in means[2:]))


def _targets(index: Index) -> tuple[Int64[np.ndarray, "k"], Int64[np.ndarray, "k"], Int64[np.ndarray, "k"]]:
    """Returns tokens, text targets and audio frames to predict of documents that fit a row, and of pieces."""
    # Evenly spread: an index of many millions is not read whole.
    places = np.unique(np.linspace(0, index.total - 1, min(index.total, SAMPLE)).astype(np.int64))
    found = [_counts(index.columns, np.setdiff1d(places, index.over))]
    # As many in a hundred of the pieces as of the documents.
    share = len(places) / max(index.total, 1)
    pieces = len(index.pieces)
    some = max(round(pieces * share), min(pieces, 1))
    found.append(_counts(index.pieces.columns, np.linspace(0, pieces - 1, some).astype(np.int64)))
    tokens, text, audio = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return tokens, text, audio


def _counts(columns: Columns, places: Int64[np.ndarray, "k"]) -> tuple[Int64[np.ndarray, "k"], ...]:
    lengths = columns.lengths[places].astype(np.int64)
    return lengths[:, 0], columns.text_targets[places].astype(np.int64), lengths[:, AUDIO_TARGETS]
