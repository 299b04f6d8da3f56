"""What the training loop asks of its data; the library imports no data pipeline."""

from collections import Counter
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

from baichuan_omni_jax.config import TrainConfig
from baichuan_omni_jax.config.loss_shares import LossShare

DocumentKey = tuple[int, int]  # source, number in it
Losses = dict[DocumentKey, tuple[str, str, str]]  # to manifest line, cause, message


@runtime_checkable
class Step(Protocol):
    """What the loop asks of a step of data (data_pipelines.packing.rows.Step is one): this host's rows of it."""

    batch: dict[str, np.ndarray]
    failed: Losses
    state: dict
    damaged: dict[DocumentKey, int]  # packets of its media that could not be decoded


@runtime_checkable
class Data(Protocol):
    """What the loop asks of a data set: names and counts for the reports, and steps from a state on."""

    documents: int
    skipped: Counter
    handled: Counter
    sources: tuple[str, ...]
    tokenizer_json: str

    def steps(self, state: dict | None) -> Iterator[Step]: ...

    def loss_shares(self, train: TrainConfig) -> list[LossShare]:
        """Which share of the loss each source is expected to have."""

    def epochs(self, state: dict) -> dict[str, float]:
        """How often each source has been read when the data's state is this one."""

    def location(self, source: int, number: int) -> str:
        """The manifest line of a document."""

    def check_failed(self, causes: Counter) -> None:
        """Raises ConfigError when too many documents turned out unusable."""
