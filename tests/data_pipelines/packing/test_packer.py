"""Rows and steps on lengths alone: nothing lost, cut, too large or waiting for ever; the same on any hosts."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import Budgets, DataConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.terms import row_cost
from data_pipelines.packing import pack
from data_pipelines.packing.packer import PATIENCE, Packer, check_plan
from data_pipelines.packing.row_limits import DocumentLengths, PatchLayout
from data_pipelines.packing.step_plan import StepPlan, order_rows
from tests.data_pipelines.conftest import with_config
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


NAMES = "abcd"


def tokens(row):
    return sum(item.lengths[0] for item in row)


def squares(row):
    return sum(item.lengths[0] ** 2 for item in row)


@st.composite
def mixtures(draw):
    """Sources with their needs (some documents in pieces, some dropped), weights, what they are counted by, budgets."""
    need = st.tuples(st.integers(1, 50), st.integers(0, 10))
    needs = draw(st.lists(st.lists(need, min_size=3, max_size=20), min_size=1, max_size=3))
    gives = [{0: [], 2: [((7, 0), []), ((9, 9), [])]} if draw(st.booleans()) else {} for _ in needs]
    weights = draw(st.lists(st.floats(0.1, 9), min_size=len(needs), max_size=len(needs)))
    budgets = [60, draw(st.integers(10, 40))]
    return needs, gives, weights, draw(st.sampled_from(["documents", "tokens"])), budgets


def check_restored(mixture, rows, window, done, workers, data):
    """Workers plan all steps and decode every n-th, hosts decode their rows of each: together what one process does."""
    needs, gives, weights, counted, budgets = mixture

    def make():
        sources = [Listed(name, own, gives=given) for name, own, given in zip(NAMES, needs, gives, strict=False)]
        plan = row_plan(sources, budgets, open_bins=2, look_ahead=4, seed=1, weights=weights, counted=counted)
        return StepPlan(plan, rows, window, squares, seed=1)

    whole = make()
    steps, states = [], []
    for step in islice(whole, done + 6):
        steps.append(step)
        states.append(json.dumps(whole.state))
    state = json.loads(states[done - 1]) if done else make().state
    host = data.draw(st.sets(st.integers(0, rows - 1), min_size=1))
    found = {}
    for worker in range(workers):
        plan = make()
        plan.restore(state)
        assert plan.state == state
        for number, step in enumerate(islice(plan, 6)):
            if number % workers == worker:
                found[number] = [step[row] for row in host]
                assert json.dumps(plan.state) == states[done + number]
    assert [found[number] for number in range(6)] == [[step[row] for row in host] for step in steps[done:]]


ANY = (mixtures(), st.integers(1, 6), st.sampled_from([0, 1, 3, 4]), st.integers(0, 14), st.integers(1, 4), st.data())


@given(*ANY)
@settings(max_examples=10)
def test_restored_at_any_step_by_any_workers_on_any_hosts(mixture, rows, window, done, workers, data):
    check_restored(mixture, rows, window, done, workers, data)


@pytest.mark.slow
@given(*ANY)
@settings(max_examples=400)
def test_restored_at_many_steps(mixture, rows, window, done, workers, data):
    check_restored(mixture, rows, window, done, workers, data)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(1, 5), st.integers(0, 5))
@settings(max_examples=15)
def test_ordering_loses_nothing(sizes, rows, window):
    def make():
        return row_plan([Listed("a", [(size,) for size in sizes])], [60], epochs=1)

    ordered = list(StepPlan(make(), rows, window, squares))
    assert Counter(key for step in ordered for row in step for key in row) == Counter((0, n) for n in range(len(sizes)))
    assert sorted(row for step in ordered for row in step) == sorted([item.key for item in row] for row in make())
    assert all(len(step) == rows for step in ordered[:-1])


def test_a_step_has_rows_of_like_cost():
    costs = np.random.default_rng(0).lognormal(14, 0.5, 512).astype(int).tolist()
    order = order_rows(costs, 32, Random(0))
    assert sorted(order) == list(range(512))
    steps = np.array(costs)[order].reshape(16, 32)
    assert np.median(steps.max(1) / steps.mean(1)) < 1.1 < np.array(costs).reshape(16, 32).max() / np.mean(costs)
    assert {-1, 1} == set(np.sign(np.diff(steps.mean(1)))), "steps come in random order"
    for ranks in (2, 4, 8):
        sums = steps.reshape(16, ranks, -1).sum(2)
        assert np.median(sums.max(1) / sums.mean(1)) < 1.02


def test_the_example_of_the_order():
    costs = [9, 2, 5, 8, 1, 6]
    order = order_rows(costs, 2, Random(0))
    steps = {tuple(costs[row] for row in order[at : at + 2]) for at in (0, 2, 4)}
    assert steps == {(9, 8), (6, 5), (2, 1)}


def test_windows_are_ordered_apart():
    plan = StepPlan(row_plan([Listed("a", [(n,) for n in range(1, 50)])], [60]), 2, 4, squares)
    plain = StepPlan(row_plan([Listed("a", [(n,) for n in range(1, 50)])], [60]), 2)
    for _ in range(3):
        ordered, packed = ([row for step in islice(each, 4) for row in step] for each in (plan, plain))
        assert sorted(ordered) == sorted(packed)


def test_a_state_of_another_version():
    plan = StepPlan(row_plan([Listed("a", [(1,)] * 5)], [10]), 2)
    with pytest.raises(ConfigError, match=r"data's state \(data\.json\) was written by another version"):
        plan.restore({"place": 5, "open": []})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"open_bins": 0}, r"data\.open_bins 0 must be at least 1"),
        ({"look_ahead": -1}, r"data\.look_ahead -1 must be at least 0"),
        ({"order_window": -1}, r"data\.order_window -1 must be at least 0"),
        ({"budgets": Budgets(items=-1)}, r"data\.budgets\.items -1 must be at least 0"),
        ({"budgets": Budgets(tokens=0)}, r"data\.budgets\.tokens 0 must be at least 1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_plan(DataConfig(**changes))


def test_an_empty_end():
    plan = StepPlan(row_plan([Listed("a", [(3,)])], [10], epochs=1), 2)
    assert [len(step) for step in plan] == [1]


def test_the_sample_mixture_fills_its_rows(sample_pipeline):
    one, other = sample_pipeline.plan(), sample_pipeline.plan()
    rows = list(islice(one, 100))
    assert rows == list(islice(other, 100))
    assert np.mean([tokens(row) for row in rows]) > 0.98 * sample_pipeline.config.budgets.tokens


def test_another_stage_goes_on_in_its_sources(sample_pipeline):
    """Half an epoch, then other weights: no document comes again before its source is through."""
    first = sample_pipeline.step_plan()
    before = {key for step in islice(first, 12) for row in step for key in row}
    state = json.loads(json.dumps(first.state))
    waiting = {tuple(key) for keys in (state["rows"]["pool"], *state["rows"]["open"]) for key in keys}
    mixture = tuple(replace(source, weight=1.0) for source in sample_pipeline.config.mixture)
    stage = with_config(sample_pipeline, mixture=mixture)
    after = {key for step in islice(stage.step_plan(resume_state=state), 3) for row in step for key in row}
    assert before
    assert not after & (before | waiting)
    with pytest.raises(ConfigError, match="written by another version"):
        stage.step_plan(resume_state={"place": 3, "open": []})


def test_costs_are_those_of_the_forward_pass(sample_pipeline, sample_codes):
    """A row's cost is what flops/terms.py counts of its batch, without the logits of the text."""
    from baichuan_omni_jax.flops.terms import flops_by_term, omni_terms

    omni = tiny()
    rows = list(islice(sample_pipeline.plan(), 4))
    for row in rows:
        counts = dict.fromkeys(("text_targets", "audio_frames"), 0) | {
            "tokens": tokens(row),
            "causal_pairs": sum(item.lengths[0] * (item.lengths[0] + 1) // 2 for item in row),
            "patches": sum(item.lengths[1] for item in row),
            "patch_pairs": sum(size**2 for item in row for size in item.image_patches),
            "audio_targets": sum(item.lengths[3] for item in row),
        }
        parts = flops_by_term(omni_terms(omni), counts, ())
        assert row_cost(omni)(row) == pytest.approx(sum(parts.values()), rel=1e-12)
    batch, _ = sample_pipeline.decoder(sample_codes)([[item.key for item in row] for row in rows])
    segments, positions = batch["segment_ids"], batch["positions"]
    pairs = np.where(segments > 0, positions + 1, 0).sum(1)
    assert pairs.tolist() == [sum(item.lengths[0] * (item.lengths[0] + 1) // 2 for item in row) for row in rows]
