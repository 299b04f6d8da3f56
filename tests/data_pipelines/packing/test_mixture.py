"""The stream of documents: shares, epochs, order, what goes on at a stage boundary, refusals."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.mixture import Mixture, epochs_read, permute
from tests.helpers.listed import Listed, stream

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def source(documents, name="a", size=1):
    return Listed(name, [(size,)] * documents)


def sources(*counts):
    return [source(count, chr(97 + number)) for number, count in enumerate(counts)]


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=25)
def test_an_order_has_every_number_once(size, seed):
    places = np.arange(size, dtype=np.int64)
    found = permute(places, size, seed)
    assert sorted(found.tolist()) == list(range(size))
    np.testing.assert_array_equal(permute(places[: size // 2], size, seed), found[: size // 2])


def test_an_order_is_random():
    """Neighbours in the order are no neighbors before it, and each number is as likely at each place."""
    found = permute(np.arange(100_000, dtype=np.int64), 100_000, "x")
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02  # 1 / sqrt(100000) = 0.003
    firsts = Counter(int(permute(np.zeros(1, np.int64), 5, str(seed))[0]) for seed in range(500))
    assert all(abs(firsts[number] - 100) < 50 for number in range(5))  # 5.6 deviations of 9
    huge = permute(np.arange(1000, dtype=np.int64), 10**12, "x")
    assert len(set(huge.tolist())) == 1000
    assert huge.min() >= 0
    assert huge.max() < 10**12


@given(WEIGHTS)
@settings(max_examples=10)
def test_shares_of_documents_are_those_of_the_weights(weights):
    mixture = Mixture(sources(*[99] * len(weights)), weights, 0)
    shares, counts = np.array(weights) / sum(weights), np.zeros(len(weights))
    for place, (number, _) in enumerate(stream(mixture, 200), 1):
        counts[number] += 1
        ahead = counts - shares * place
        assert (ahead >= -1 - 1e-9).all()
        assert (ahead <= len(weights) * shares + 1e-9).all()


@given(WEIGHTS, st.data())
@settings(max_examples=8)
def test_shares_of_tokens_are_those_of_the_weights(weights, data):
    sizes = [data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=9)) * 9 for _ in weights]
    listed = [Listed(str(number), [(size,) for size in own]) for number, own in enumerate(sizes)]
    mixture = Mixture(listed, weights, 0, counted="tokens")
    shares, tokens = np.array(weights) / sum(weights), np.zeros(len(weights))
    for number, document in stream(mixture, 200):
        tokens[number] += sizes[number][document]
        ahead = tokens - shares * tokens.sum()
        assert (ahead >= -500 - 1e-6).all()
        assert (ahead <= 500 * len(weights) * shares + 1e-6).all()


def test_shares_of_what_is_trainable_are_those_of_the_weights():
    """Long documents with little to learn, and short ones with much."""
    sizes = [[(100, 2), (90, 1)], [(10, 9), (20, 18)]]
    lengths = [[(tokens, 0, 0, 0, targets, 0, 0) for tokens, targets in own] * 50 for own in sizes]
    listed = [Listed(str(n), own) for n, own in enumerate(lengths)]
    mixture, given = Mixture(listed, [0.6, 0.4], 0, counted="trainable"), np.zeros(2)
    for number, document in stream(mixture, 400):
        given[number] += sizes[number][document % 2][1]
    np.testing.assert_allclose(given / given.sum(), [0.6, 0.4], atol=18 / given.sum())


def test_the_example_of_two_to_one():
    assert [number for number, _ in stream(Mixture(sources(9, 9), [2, 1], 0), 6)] == [0, 0, 1, 0, 0, 1]


def test_nearly_equal_weights_are_not_equal():
    """Far on in the stream: the counts are exact however long it is."""
    mixture = Mixture(sources(5000, 5000), [1.0, 1.009], 0)
    state = mixture.state
    state["a"] |= {"cursor": 10**12, "given": 10**12}
    state["b"] |= {"cursor": 1009 * 10**9, "given": 1009 * 10**9}
    mixture.restore(state)
    counts = Counter(number for number, _ in stream(mixture, 2009))
    assert counts[0] == pytest.approx(1000, abs=2)


def test_every_epoch_has_every_document_in_another_order():
    found = stream(Mixture([source(40)], [1.0], 5), 120)
    epochs = [found[40 * epoch : 40 * epoch + 40] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, number) for number in range(40)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_and_sources_are_shuffled_apart():
    read = [stream(Mixture(sources(40, 40), [1, 1], seed), 80) for seed in (1, 1, 2)]
    assert read[0] == read[1] != read[2]
    first, second = ([number for which, number in read[0] if which == one] for one in (0, 1))
    assert first != second


def test_the_order_of_a_source_depends_on_nothing_but_its_name_and_seed():
    a, b = sources(40, 40)
    streams = [Mixture([a, b], [1, 1], 1), Mixture([a, b], [1, 3], 1), Mixture([b, a], [5, 1], 1)]
    orders = [
        [n for which, n in stream(each, 90) if which == own] for each, own in zip(streams, (0, 0, 1), strict=True)
    ]
    shortest = min(map(len, orders))
    assert shortest > 10
    assert orders[0][:shortest] == orders[1][:shortest] == orders[2][:shortest]


def test_a_number_of_epochs_is_the_whole_data_set():
    mixture = Mixture(sources(5, 3), [1.0, 9.0], 0, epochs=2)
    assert Counter(stream(mixture)) == Counter({(0, n): 2 for n in range(5)} | {(1, n): 2 for n in range(3)})
    assert mixture.next() is None
    assert epochs_read(mixture.state) == {"a": 2.0, "b": 2.0}


PIECES = {1: [((4,), []), ((5,), [])], 3: [], 6: [((6,), [])]}


def test_a_document_may_give_pieces_or_nothing():
    one = Listed("a", [(1,)] * 8, gives=PIECES)
    assert one.usable == 8
    found = [number for _, number in stream(Mixture([one], [1], 0, epochs=1))]
    assert sorted(found) == [0, 2, 4, 5, 7, 8, 9, 10]
    assert found.index(9) == found.index(8) + 1, "pieces come one after the other"


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 60), st.sampled_from(["documents", "tokens"])
)
@settings(max_examples=10)
def test_a_restored_stream_goes_on(counts, done, counted):
    def make():
        given_pieces = Listed("pieces", [(n + 1,) for n in range(8)], gives=PIECES)
        return Mixture([*sources(*counts), given_pieces], [*range(1, len(counts) + 1), 2.5], 3, counted=counted)

    whole, again = make(), make()
    stream(whole, done)
    again.restore(json.loads(json.dumps(whole.state)))
    assert again.state == whole.state
    assert stream(again, 30) == stream(whole, 30)


def test_another_mixture_goes_on_where_each_source_was_left():
    """Other weights, one source less, one more: those that stay are read on, from the middle of their epoch."""
    before = Mixture(sources(40, 30, 20), [1, 1, 1], 7)
    read = stream(before, 45)
    a, c = source(40, "a"), source(20, "c")
    after = Mixture([c, a, source(5, "new")], [1, 4, 1], 7)
    assert after.continue_from(json.loads(json.dumps(before.state))) == ["new"]
    counts = Counter(stream(after, 30)), Counter(number for number, _ in stream(Mixture([c, a], [1, 4], 7), 30))
    assert sum(counts[0][key] for key in counts[0] if key[0] == 1) == 20, "shares are counted anew"
    old = {(0 if which == 2 else 1, number) for which, number in read if which != 1}
    fresh = [key for key in counts[0] if key[0] < 2]
    assert not old & set(fresh), "no document comes again before the epoch's end"


def test_a_source_of_other_documents_starts_anew():
    before = Mixture([source(40)], [1], 7)
    stream(before, 10)
    after = Mixture([source(41)], [1], 7)
    assert after.continue_from(before.state) == ["a"]
    assert epochs_read(after.state) == {"a": 0.0}
    with pytest.raises(ConfigError, match=r"source a has 41 documents; the data's state is of 40"):
        after.restore(before.state)
    with pytest.raises(ConfigError, match=r"data\.seed is 8; the data's state is of seed 7"):
        Mixture([source(40)], [1], 8).restore(before.state)
    with pytest.raises(ConfigError, match=r"state is of the sources a, not b"):
        Mixture([source(40, "b")], [1], 7).restore(before.state)


def test_refusals():
    with pytest.raises(ConfigError, match=r"source b has no usable document: it is empty"):
        Mixture(sources(2, 0), [1, 1], 0)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"source a: weight {weight} must be positive"):
            Mixture([source(1)], [weight], 0)
    with pytest.raises(ConfigError, match=r"two sources of the mixture are called a"):
        Mixture([source(1), source(2)], [1, 1], 0)
    with pytest.raises(ConfigError, match=r"data\.weights_by 'bytes' is neither documents nor tokens"):
        Mixture([source(1)], [1], 0, counted="bytes")
