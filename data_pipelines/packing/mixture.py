"""The one endless stream of documents: every source in a new order each epoch, sources interleaved by weight.

Next is the source that is furthest behind its share: the smallest (given + what its next document adds) / weight, where
documents, tokens, or what is trainable of them are counted. With weights 2 and 1 and documents counted: sources 0 0 1,
0 0 1, ... However long the stream, a source has given its share of it less at most 1 and more at most sources * weight
/ sum of weights, times the longest document where not documents are counted. (Grain's own `mix` cuts weights to whole
hundredths of the smallest: with 1 and 1.009 it gives equal shares for ever.)

What each source weighs in the loss on average is known from its index before training (`source_means`).

The order of an epoch takes no memory: any place of it is computed by itself. A Feistel network permutes the numbers of
an even count of bits, whatever its round function is; a result that is not below n is permuted again until it is, which
stays a permutation of those below n.
"""

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt64

from baichuan_omni_jax.config import DataConfig, SourceConfig
from baichuan_omni_jax.config.loss_shares import POWERS, SourceMeans
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.columns import Columns
from data_pipelines.packing.index import Index
from data_pipelines.packing.row_limits import AUDIO_TARGETS, TEXT_TARGETS, DocumentKey, DocumentLengths

COUNTED = ("documents", "tokens", "trainable")
_AHEAD = 512  # documents of a source whose lengths are read at once


@runtime_checkable
class Documents(Protocol):
    """What the stream asks of a source (`data_pipelines.packing.index.Index` is one).

    `total` documents have an order in each epoch, whatever the budgets are; `usable` of what they give can be packed.
    """

    @property
    def name(self) -> str: ...

    @property
    def total(self) -> int: ...

    @property
    def usable(self) -> int: ...

    def expand(self, numbers: Int64[np.ndarray, "k"]) -> list[list[DocumentLengths]]:
        """Gives for each of these documents (numbered below `total`) itself, pieces of it, or nothing."""
        ...

    def document_lengths(self, number: int) -> DocumentLengths:
        """Returns the document or piece with this number."""
        ...

    def why_unusable(self) -> str:
        """Says why no document can be used."""
        ...


class Mixture:
    """The stream, read one document after the other; the same on every host. JSON-ready state, restored at once.

    Args:
        sources: what is read, by its name in messages and states.
        weights: each source's share, in any unit.
        seed: decides the order of every epoch.
        counted: what shares are counted in: `documents`, `tokens`, or `trainable` tokens and frames.
        epochs: how often every source is read, one source after the other, for looking at a whole data set; None:
            endless.

    Raises:
        ConfigError: a source without usable documents, two of one name, a weight that is not positive, or anything
            counted that is not in `COUNTED`.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float | int],
        seed: int,
        *,
        counted: str = "documents",
        epochs: int | None = None,
    ):
        _check(sources, weights, counted)
        self._sources, self._counted, self._epochs = sources, counted, epochs
        self._readers = [_Reader(source, number, seed, epochs) for number, source in enumerate(sources)]
        self._by_name = {source.name: reader for source, reader in zip(sources, self._readers, strict=True)}
        exact = [Fraction(weight) for weight in weights]
        # Integers in the proportions of 1 / weight: sums of them are exact for ever.
        smallest = math.lcm(*(weight.numerator for weight in exact))
        inverse = [smallest / weight for weight in exact]
        common = math.lcm(*(each.denominator for each in inverse))
        self._inverse = [int(each * common) for each in inverse]
        # Kept between documents, so that the next one costs one comparison a source.
        self._behind = [0] * len(self._readers)  # (given + next) / weight
        self._count_next()

    def next(self) -> DocumentLengths | None:
        """Returns the next document; None after the last epoch."""
        chosen = self._next_source()
        if chosen is None:
            return None
        reader = self._readers[chosen]
        document = reader.take(self._cost(reader))
        self._behind[chosen] = self._due(chosen)
        return document

    def document(self, key: DocumentKey) -> DocumentLengths:
        """Returns one document of the stream again."""
        source, number = key
        return DocumentLengths(*self._sources[source].document_lengths(number)[:3], source)

    @property
    def state(self) -> dict:
        """By source: `seed` and number of `documents` (their order), `cursor` of them read (over all epochs), `part`
        pieces of the next one read as well, `given` of what is counted.
        """
        return {name: reader.state for name, reader in self._by_name.items()}

    def restore(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on where `state` was taken. Raises ConfigError when it is of other sources, documents or seed."""
        if list(state) != list(self._by_name):
            raise ConfigError(f"the data's state is of the sources {', '.join(state)}, not {', '.join(self._by_name)}")
        for name, reader in self._by_name.items():
            if state[name]["documents"] != reader.documents:
                raise ConfigError(
                    f"source {name} has {reader.documents} documents; the data's state is of {state[name]['documents']}"
                )
            if state[name]["seed"] != reader.state["seed"]:
                raise ConfigError(
                    f"data.seed is {reader.state['seed']}; the data's state is of seed {state[name]['seed']}: "
                    "in another order documents would come twice or not at all"
                )
            reader.restore(state[name])
        self._count_next()

    def continue_from(self, state: Mapping[str, Mapping[str, int]]) -> list[str]:
        """Starts each source where another mixture's `state` left it; shares are counted anew.

        Returns the names of sources that it does not know, or knows in another order: they start at their first.
        """
        new = []
        for name, reader in self._by_name.items():
            left = state.get(name)
            if left is None or any(left[key] != reader.state[key] for key in ("seed", "documents")):
                new.append(name)
            else:
                reader.restore({**left, "given": 0})
        self._count_next()
        return new

    def _next_source(self) -> int | None:
        if self._epochs is None:
            return self._behind.index(min(self._behind))
        return next((number for number, reader in enumerate(self._readers) if reader.peek()), None)

    def _cost(self, reader: "_Reader") -> int:
        document = reader.peek()
        if document is None:  # of an endless source there always is one
            raise ValueError("the source is at its end")
        if self._counted == "documents":
            return 1
        return document.lengths[0] if self._counted == "tokens" else document.trainable

    def _due(self, source: int) -> int:
        reader = self._readers[source]
        return (reader.given + self._cost(reader)) * self._inverse[source] if self._epochs is None else 0

    def _count_next(self) -> None:
        self._behind = [self._due(source) for source in range(len(self._readers))]


def epochs_read(state: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Tells how often each source has been read, by its name, from a mixture's state."""
    return {name: source["cursor"] / source["documents"] for name, source in state.items()}


class _Reader:
    """One source, epoch after epoch. The lengths of the next documents are read ahead, many at once."""

    def __init__(self, source: Documents, number: int, seed: int, epochs: int | None):
        self.documents = source.total
        self._source, self._number = source, number
        self._seed = seed
        self._end = None if epochs is None else epochs * source.total
        self.restore({"cursor": 0, "part": 0, "given": 0})

    @property
    def state(self) -> dict:
        order = {"seed": self._seed, "documents": self.documents}
        return order | {"cursor": self._cursor, "part": self._part, "given": self.given}

    def restore(self, state: Mapping[str, int]) -> None:
        self._cursor, self._part, self.given = state["cursor"], state["part"], state["given"]
        self._read = self._cursor  # documents in `_ahead` or before it
        self._ahead: deque[tuple[DocumentLengths, int, int]] = deque()  # with the cursor and the part after each
        self._skip = self._part

    def peek(self) -> DocumentLengths | None:
        """Returns the next document; None when the last epoch is over."""
        while not self._ahead:
            if not self._read_ahead():
                return None
        return self._ahead[0][0]

    def take(self, counted: int) -> DocumentLengths:
        """Takes the next document, which there must be."""
        self.peek()
        document, self._cursor, self._part = self._ahead.popleft()
        self.given += counted
        return document

    def _read_ahead(self) -> bool:
        epoch, place = divmod(self._read, self.documents)
        if self._end is not None and self._read >= self._end:
            return False
        # Many places of the order at once: the index is read in blocks, not document by document.
        places = np.arange(place, min(place + _AHEAD, self.documents), dtype=np.int64)
        # By name: the order of a source does not depend on the others.
        numbers = permute(places, self.documents, f"{self._seed} {self._source.name} {epoch}")
        for found in self._source.expand(numbers):
            self._read += 1
            # The cursor moves with a document's last piece, so that a state among its pieces is exact.
            for part, document in enumerate(found, 1):
                last = part == len(found)
                document = DocumentLengths(*document[:3], self._number)
                self._ahead.append((document, self._read if last else self._read - 1, 0 if last else part))
            for _ in range(min(self._skip, len(found))):
                self._ahead.popleft()
            self._skip = 0
        return True


def _check(sources: Sequence[Documents], weights: Sequence[float | int], counted: str) -> None:
    if counted not in COUNTED:
        raise ConfigError(f"data.weights_by {counted!r} is neither documents nor tokens nor trainable")
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two sources of the mixture are called {twice[0]}")
    for source, weight in zip(sources, weights, strict=True):
        if not source.usable:
            raise ConfigError(f"source {source.name} has no usable document: {source.why_unusable()}")
        if not 0 < weight < math.inf:
            raise ConfigError(f"source {source.name}: weight {weight} must be positive")


ROUNDS = 6


def permute(places: Int64[np.ndarray, "k"], size: int, seed: str) -> Int64[np.ndarray, "k"]:
    """Looks up what stands at these places (each below `size`) of the order of 0 ... size - 1 that `seed` gives."""
    # The least even count of bits that holds every number: at most three of four results are out of range.
    half = max((size - 1).bit_length() + 1, 2) // 2
    keys = np.frombuffer(hashlib.sha256(seed.encode()).digest()[: 4 * ROUNDS], "<u4").astype(np.uint64)
    values = places.astype(np.uint64)
    left = np.arange(len(values))
    while len(left):
        values[left] = _feistel(values[left], half, keys)
        left = left[values[left] >= size]
    return values.astype(np.int64)


def _feistel(values: UInt64[np.ndarray, "k"], half: int, keys: UInt64[np.ndarray, "rounds"]) -> UInt64[np.ndarray, "k"]:
    """Permutes the numbers of 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    high, low = values >> bits, values & mask
    for key in keys[:, None]:
        high, low = low, high ^ (_mix(low, key) & mask)
    return high << bits | low


def _mix(values: UInt64[np.ndarray, "k"], key: UInt64[np.ndarray, "1"]) -> UInt64[np.ndarray, "k"]:
    """Hashes 64 bits: splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    mixed = values + (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


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
    return lengths[:, 0], lengths[:, TEXT_TARGETS], lengths[:, AUDIO_TARGETS]
