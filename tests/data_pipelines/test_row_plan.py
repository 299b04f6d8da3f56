"""Packing on lengths alone: nothing lost, nothing too large, resumable anywhere."""

import json
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.media_layout import PatchLayout
from data_pipelines.row_plan import RowPlan

BUDGETS = np.array([20, 12, 6, 3])
LAYOUT = PatchLayout(12, 3)
# What a document takes of each budget; its patches are in pictures of at most 4.
LENGTHS = st.lists(st.tuples(*(st.integers(int(i == 0), int(b)) for i, b in enumerate(BUDGETS))), max_size=60)


def pictures_of(need):
    """A document's patches as pictures of 4, the last one smaller."""
    return [min(4, need[1] - done) for done in range(0, need[1], 4)] if len(need) > 1 else []


def plan(lengths, open_bins=3, budgets=BUDGETS, layout=LAYOUT):
    """The plan of documents with these needs, all of source 7."""
    stream = grain.MapDataset.range(len(lengths)).map(lambda number: (7, number))
    needs = lambda _, number: np.asarray(lengths[number], np.int32)  # noqa: E731
    return RowPlan(stream, needs, lambda _, number: pictures_of(lengths[number]), budgets, layout, open_bins)


def numbers(rows):
    return [[number for _, number in row] for row in rows]


@given(LENGTHS, st.integers(1, 5))
def test_every_document_is_in_one_row_and_no_row_is_over_a_budget(lengths, open_bins):
    rows = list(plan(lengths, open_bins))
    assert Counter(key for row in rows for key in row) == Counter((7, number) for number in range(len(lengths)))
    for row in rows:
        assert row
        assert (sum(np.array(lengths[number]) for _, number in row) <= BUDGETS).all()
        assert LAYOUT.fits([size for _, number in row for size in pictures_of(lengths[number])])


@given(LENGTHS, st.integers(1, 5), st.data())
def test_a_restored_plan_goes_on_with_the_same_rows(lengths, open_bins, data):
    whole = plan(lengths, open_bins)
    rows = list(whole)
    done = data.draw(st.integers(0, len(rows)))
    first = plan(lengths, open_bins)
    assert [next(first) for _ in range(done)] == rows[:done]
    state = json.loads(json.dumps(first.state))
    second = plan(lengths, open_bins)
    second.restore(state)
    assert second.state == state
    assert list(second) == rows[done:]
    assert list(first) == rows[done:]


def test_more_open_rows_fill_them_better():
    lengths = np.random.default_rng(0).integers(1, 15, (300, 1))

    def fill(open_bins):
        rows = numbers(plan(lengths, open_bins, budgets=[20]))
        return np.mean([lengths[row].sum() for row in rows[:-open_bins]]) / 20

    assert fill(1) < fill(4) < fill(16)
    assert fill(16) > 0.95


def test_the_example_of_the_docstring():
    found = plan([[6], [5], [3], [4], [7]], open_bins=2, budgets=[10])
    assert next(found) == [(7, 0), (7, 2)]
    assert found.state == {"place": 5, "open": [[[7, 1], [7, 3]], [[7, 4]]]}
    assert numbers(found) == [[1, 3], [4]]


def test_a_full_second_budget_closes_a_row():
    assert numbers(plan([[1, 3], [1, 0], [1, 2]], open_bins=1, budgets=[9, 3])) == [[0, 1], [2]]


def test_a_picture_without_a_whole_place_goes_to_another_row():
    documents = [[1, 3]] * 4
    assert numbers(plan(documents, open_bins=1, budgets=[9, 12], layout=PatchLayout(12, 1))) == [[0, 1, 2, 3]]
    assert numbers(plan(documents, open_bins=1, budgets=[9, 12], layout=PatchLayout(12, 3))) == [[0, 1, 2], [3]]
    # Larger ones move for it: 2 and 2 share the part that the first two had begun.
    pictures = [[1, 2], [1, 4], [1, 2], [1, 4]]
    assert numbers(plan(pictures, open_bins=1, budgets=[9, 12], layout=PatchLayout(12, 3))) == [[0, 1, 2, 3]]


def test_an_empty_stream_has_no_row():
    empty = plan([])
    with pytest.raises(StopIteration):
        next(empty)
    assert empty.state == {"place": 0, "open": []}


def test_the_sample_mixture_fills_its_rows(sample_pipeline):
    one, other = sample_pipeline.plan(), sample_pipeline.plan()
    rows = [next(one) for _ in range(100)]
    assert rows == [next(other) for _ in range(100)]
    tokens = [sum(sample_pipeline.indexes[source].needs(number)[0] for source, number in row) for row in rows]
    assert np.mean(tokens) > 0.9 * sample_pipeline.config.budgets.tokens
