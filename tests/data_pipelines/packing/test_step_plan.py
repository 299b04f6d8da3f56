"""Steps that go on with other rows a step and on other hosts: every document once an epoch, whatever changed."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.packing.rows import RowShard
from data_pipelines.packing.step_plan import StepPlan
from tests.helpers.listed import Listed, row_plan

# A start: rows a step, hosts that share them out, steps until it is stopped.
START = st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16, 32]), st.sampled_from([1, 2, 4]), st.integers(0, 9))
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=300)


def cost(row):
    return sum(item.lengths[0] ** 2 for item in row)


def plan_of(sizes, rows, window, **options):
    plan = row_plan([Listed("a", [(size,) for size in sizes])], [60], seed=1, **options)
    return StepPlan(plan, rows, window, cost, seed=1)


def rows_of_hosts(step, rows, hosts):
    """What the hosts decode of a step, each its own part; the last step of an epoch may be short."""
    if len(step) < rows or rows % hosts:
        return step
    part = rows // hosts
    shards = [RowShard(tuple(range(host * part, (host + 1) * part))) for host in range(hosts)]
    return [row for shard in shards for row in shard.select(step)]


def run(sizes, window, starts, **options):
    """The documents of all starts, one after the other, each going on from the state of the one before as JSON."""
    state, found = None, []
    for rows, hosts, steps in [*starts, (4, 1, None)]:
        plan = plan_of(sizes, rows, window, **options)
        if state is not None:
            plan.restore(json.loads(state))
        for step in islice(plan, steps):
            assert len(step) <= rows
            found += rows_of_hosts(step, rows, hosts)
        state = json.dumps(plan.state)
    return found


def check_once(sizes, window, starts, epochs):
    rows = run(sizes, window, starts, epochs=epochs)
    assert Counter(key for row in rows for key in row) == Counter({(0, n): epochs for n in range(len(sizes))})


@given(SIZES, st.sampled_from([1, 3, 4]), st.lists(START, max_size=4), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_every_document_once_an_epoch_whatever_the_rows_of_each_start(sizes, window, starts, epochs):
    check_once(sizes, window, starts, epochs)


@pytest.mark.slow
@given(SIZES, st.sampled_from([1, 2, 3, 4, 16]), st.lists(START, max_size=8), st.integers(1, 3))
@settings(max_examples=1500, deadline=None)
def test_every_document_once_an_epoch_over_many_starts(sizes, window, starts, epochs):
    check_once(sizes, window, starts, epochs)


@pytest.mark.parametrize("window", [1, 4])
def test_more_rows_then_fewer_on_two_hosts_then_one_then_four(window):
    """16 rows, 32, 8; the packing itself is that of a run that never stopped, so no document changes its row."""
    sizes = [size % 50 + 1 for size in range(0, 7 * 3000, 7)]
    starts = [(16, 2, 3), (32, 1, 5), (8, 4, 7), (16, 2, 6)]
    rows = run(sizes, window, starts, epochs=1)
    assert sorted(rows) == sorted(
        [item.key for item in row] for row in row_plan([Listed("a", [(n,) for n in sizes])], [60], seed=1, epochs=1)
    )


def test_rows_left_over_come_first_and_are_named_by_the_state():
    sizes = list(range(1, 51)) * 4
    before = plan_of(sizes, 4, 4)
    first = list(islice(before, 3))
    after = plan_of(sizes, 2, 4)
    after.restore(before.state)
    left = before._steps[3]
    assert [[tuple(key) for key in row] for row in after.state["left"]] == left
    # Nothing of what the first steps had comes again before the epoch is over, and the rest of the window is among
    # the first rows.
    next_rows = [row for step in islice(after, 4) for row in step]
    assert all(row in next_rows for row in left)
    assert not [row for step in first for row in step if row in next_rows]
    assert "left" not in after.state


def test_the_state_of_an_older_version_is_gone_on_from():
    sizes = list(range(1, 51)) * 4
    plan, again = plan_of(sizes, 4, 4), plan_of(sizes, 4, 4)
    list(islice(plan, 6))
    older = {key: value for key, value in plan.state.items() if key != "rows_a_step"} | {"format": 2}
    again.restore(older)
    assert list(islice(again, 9)) == list(islice(plan, 9))
