"""Packing on lengths alone: nothing lost, nothing cut, nothing too large, nothing waiting for ever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.packing import pack
from data_pipelines.packing.packer import PATIENCE, Packer
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout
from tests.helpers.listed import Listed, row_plan

BUDGETS = [20, 12, 6, 3]
LAYOUT = PatchLayout(12, 3)
# What a document takes of each budget; its patches are in images of at most 4.
LENGTHS = st.lists(st.tuples(*(st.integers(int(i == 0), b) for i, b in enumerate(BUDGETS))), min_size=1, max_size=60)


def image_patches(need):
    """A document's patches as images of 4, the last one smaller."""
    return [min(4, need[1] - done) for done in range(0, need[1], 4)] if len(need) > 1 else []


def listed(lengths, name="a"):
    return Listed(name, lengths, [image_patches(need) for need in lengths])


def rows_of(lengths, budgets=BUDGETS, layout=LAYOUT, open_bins=3, look_ahead=5):
    """All rows of documents in this order."""
    packer = Packer(budgets, layout, open_bins, look_ahead)
    items = [DocumentLengths(n, tuple(need), image_patches(need)) for n, need in enumerate(lengths)]
    rows = [row for item in items if (row := packer.add(item)) is not None]
    while (row := packer.finish()) is not None:
        rows.append(row)
    return [[item.key[1] for item in row] for row in rows]


@given(LENGTHS, st.integers(1, 5), st.integers(0, 20))
@settings(max_examples=30)
def test_every_document_is_in_one_row_and_no_row_is_over_a_budget(lengths, open_bins, look_ahead):
    rows = rows_of(lengths, open_bins=open_bins, look_ahead=look_ahead)
    assert Counter(number for row in rows for number in row) == Counter(range(len(lengths)))
    for row in rows:
        assert row
        assert (sum(np.array(lengths[number]) for number in row) <= BUDGETS).all()
        assert LAYOUT.fits([size for number in row for size in image_patches(lengths[number])])


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 9), st.integers(0, 30))
@settings(max_examples=15)
def test_a_restored_plan_goes_on_with_the_same_rows(lengths, open_bins, look_ahead, done):
    def make():
        sources = [listed(own, str(number)) for number, own in enumerate(lengths)]
        return row_plan(sources, BUDGETS, layout=LAYOUT, open_bins=open_bins, look_ahead=look_ahead, epochs=1)

    whole = make()
    rows = list(whole)
    first, second = make(), make()
    done = min(done, len(rows))
    assert [next(first) for _ in range(done)] == rows[:done]
    second.restore(first.state)
    assert second.state == first.state
    assert list(second) == rows[done:]


def test_the_pool_fills_rows():
    """Log-normal documents: a pool makes rows full that without one leave a part empty."""
    sizes = np.random.default_rng(0).lognormal(4, 1, 3000).clip(1, 1000).astype(int)

    def fill(open_bins, look_ahead):
        rows = rows_of(sizes[:, None].tolist(), [1000], PatchLayout(0), open_bins, look_ahead)
        return np.mean([sizes[row].sum() for row in rows[: -open_bins - 1]]) / 1000

    assert fill(8, 64) > 0.998 > fill(8, 0)
    assert fill(1, 0) < fill(8, 0)


def test_several_budgets_are_filled_together():
    """Text, images and audio in rows with a quarter more room for media than they take on average."""
    rng = np.random.default_rng(0)
    tokens = rng.lognormal(4, 1, 3000).clip(1, 1000).astype(int)
    kinds = rng.integers(3, size=3000)
    needs = np.stack([tokens, tokens * 3 * (kinds == 1), tokens // 2 * (kinds == 2)], 1)
    budgets = np.ceil(1.25 * 1000 * needs.mean(0) / tokens.mean()).astype(int)
    budgets = np.maximum(budgets, needs.max(0))
    rows = rows_of(needs.tolist(), [1000, *budgets[1:].tolist()], PatchLayout(int(budgets[1])), 8, 64)
    assert np.mean([tokens[row].sum() for row in rows[:-9]]) > 0.99 * 1000


def test_the_example_of_the_docstring():
    packer = Packer([100], PatchLayout(0), open_bins=2, look_ahead=3)
    items = [DocumentLengths(size, (size,), []) for size in (60, 70, 25, 33, 12, 15, 30)]
    assert [packer.add(item) for item in items[:-1]] == [None] * 6
    assert packer.state["open"] == [[[0, 60], [0, 25]], [[0, 70]]]
    assert packer.state["pool"] == [[0, 33], [0, 12], [0, 15]]
    assert [item.key[1] for item in packer.add(items[-1])] == [60, 25, 15]
    assert packer.state["open"] == [[[0, 70]], [[0, 33]]]


def test_a_full_second_budget_closes_a_row():
    assert rows_of([[1, 3], [1, 0], [1, 2]], [9, 3], PatchLayout(3), 1, 0) == [[0], [1, 2]]


def test_a_image_without_a_whole_place_goes_to_another_row():
    def rows(documents, parts):
        return rows_of(documents, [90, 12], PatchLayout(12, parts), open_bins=1, look_ahead=3)

    assert max(map(len, rows([[1, 3]] * 12, 1))) == 4
    assert max(map(len, rows([[1, 3]] * 12, 3))) == 3
    # Images of 2 share a part that larger ones leave them.
    assert max(map(len, rows([[1, 4], [1, 2]] * 6, 3))) == 4


@pytest.mark.parametrize("open_bins", [1, 3])
def test_no_row_stays_open_for_ever(open_bins):
    """One document takes all of a budget that all others need some of: its row is never the fullest."""
    lengths = [[1, 10], *[[6, 1]] * 1500]
    rows = rows_of(lengths, [20, 10], PatchLayout(10), open_bins, look_ahead=4)
    assert next(place for place, row in enumerate(rows) if 0 in row) <= PATIENCE * open_bins


@given(LENGTHS, st.integers(1, 5), st.integers(0, 20))
@settings(max_examples=15)
def test_pack_gives_the_rows_of_a_run(lengths, open_bins, look_ahead):
    """The door for lengths alone is the packer of training, images aside."""
    rows = pack(lengths, BUDGETS, open_bins=open_bins, look_ahead=look_ahead)
    assert rows == rows_of(lengths, layout=PatchLayout(BUDGETS[1]), open_bins=open_bins, look_ahead=look_ahead)
    assert rows == pack(np.array(lengths), np.array(BUDGETS), open_bins=open_bins, look_ahead=look_ahead)


def test_pack_takes_one_length_a_document_or_none_at_all():
    assert pack([3, 4], 9) == pack([[3], [4]], [9]) == [[0, 1]]
    assert pack([], 9) == pack([], [9, 9]) == []


@pytest.mark.parametrize(
    ("lengths", "budgets", "message"),
    [
        ([5, 12], 9, r"document 1 takes \[12\], more than a row holds: \[9\]"),
        ([[5, 1]], 9, "do not go with 1 budgets"),
        ([5], [9, 9], "do not go with 2 budgets"),
        (np.array([0.5]), 9, "whole numbers"),
        ([-1], 9, "whole numbers"),
    ],
)
def test_pack_refuses_what_it_cannot_pack(lengths, budgets, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, budgets)
