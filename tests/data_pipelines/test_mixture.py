"""The stream of documents: shares, epochs, refusals."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baichuan_omni_jax.config import ConfigError
from data_pipelines.index import COLUMNS, Index, Skipped
from data_pipelines.mixture import Shares, document_stream


def index(documents, name="a", skipped=()):
    lengths = np.ones((documents, len(COLUMNS)), np.int32)
    places = np.arange(documents, dtype=np.int64)
    pictures = (np.zeros(0, np.int32), np.zeros(documents + 1, np.int64))
    return Index(name, f"{name}.jsonl", Path("/nowhere"), lengths, places, places + 1, *pictures, tuple(skipped))


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@given(WEIGHTS, st.integers(0, 10**12))
def test_shares_are_those_of_the_weights(weights, start):
    """At any place of the stream, however far: the counts so far are the weights' shares of it."""
    shares, exact = Shares(weights), np.array(weights) / sum(weights)
    bound = sum(1 / n for n in range(1, len(weights) + 1)) + 1e-3  # float64 of 1e12 documents
    counts = {}
    for place in range(start, start + 200):
        source, number = shares[place]
        assert number == counts.get(source, number), "each source gives its documents one after the other"
        counts[source] = number + 1
        assert abs(number + 1 - exact[source] * (place + 1)) <= bound


@given(WEIGHTS)
def test_every_source_starts_at_its_first_document(weights):
    shares, counts = Shares(weights), [0] * len(weights)
    for place in range(100):
        source, number = shares[place]
        assert number == counts[source]
        counts[source] += 1


def test_the_example_of_two_to_one():
    assert [Shares([2, 1])[place][0] for place in range(6)] == [0, 0, 1, 0, 0, 1]


def test_nearly_equal_weights_are_not_equal():
    last = {source: number for source, number in map(Shares([1.0, 1.009]).__getitem__, range(2_008_900, 2_009_000))}
    assert last == {0: pytest.approx(1_000_000, abs=2), 1: pytest.approx(1_009_000, abs=2)}


def test_every_epoch_has_every_document_in_another_order():
    stream = document_stream([index(40)], [1.0], seed=5)
    epochs = [[stream[40 * epoch + place] for place in range(40)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, number) for number in range(40)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_and_sources_are_shuffled_apart():
    one, same, other = (document_stream([index(40), index(40)], [1, 1], seed) for seed in (1, 1, 2))
    read = [[stream[place] for place in range(80)] for stream in (one, same, other)]
    assert read[0] == read[1] != read[2]
    first, second = ([number for source, number in read[0] if source == which] for which in (0, 1))
    assert first != second


def test_the_order_of_a_source_does_not_depend_on_the_weights():
    streams = [document_stream([index(40), index(40)], [1, weight], 1) for weight in (1, 3)]
    first = [[number for source, number in map(stream.__getitem__, range(40)) if source == 0] for stream in streams]
    assert first[0][: len(first[1])] == first[1]


def test_a_number_of_epochs_is_the_whole_data_set():
    stream = document_stream([index(5), index(3)], [1.0, 9.0], 0, epochs=2)
    assert len(stream) == 16
    found = Counter(stream[place] for place in range(16))
    assert found == Counter({(0, n): 2 for n in range(5)} | {(1, n): 2 for n in range(3)})


def test_refusals():
    skipped = [Skipped("b.jsonl:1", "bad_json", ""), Skipped("b.jsonl:2", "bad_json", "")]
    with pytest.raises(ConfigError, match=r"source b \(b\.jsonl\) has no usable document: skipped 2 bad_json"):
        document_stream([index(2), index(0, "b", skipped)], [1, 1], 0)
    with pytest.raises(ConfigError, match="has no usable document: it is empty"):
        document_stream([index(0)], [1], 0)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"source a: weight {weight} must be positive"):
            document_stream([index(1)], [weight], 0)
