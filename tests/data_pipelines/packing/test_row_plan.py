"""Steps of rows: ordered by cost, the same on any number of hosts and workers, restored anywhere."""

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
from data_pipelines.packing.packer import StepPlan, check_plan, order_rows
from tests.data_pipelines.conftest import with_config
from tests.helpers.listed import Listed, row_plan

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
