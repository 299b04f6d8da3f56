"""Tokens dealt to context shards: nothing lost, everything still pointing at its token, work shared evenly."""

from itertools import islice

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import Budgets, DataConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.kernels.flash_attention.plan import Segments, plan_row, unpack
from data_pipelines.packing.batch import (
    INDEX_FIELDS,
    TOKEN_FIELDS,
    ContextPlan,
    block_work,
    check_context,
    deal_blocks,
    empty_rows,
    lay_documents,
)
from data_pipelines.packing.rows import ALL_ROWS
from data_pipelines.pipeline import TrainingData
from tests.data_pipelines.conftest import with_config

LENGTH, BLOCK = 128, 8
BUDGETS = Budgets(tokens=LENGTH, patches=32, audio_frames=12, audio_targets=6)
# Lengths of documents and, where negative, of holes that lost documents leave.
DOCUMENTS = st.lists(st.integers(-20, 100).filter(bool), max_size=20)
PLANS = [ContextPlan(shards, BLOCK, kind) for shards in (1, 2, 8) for kind in ("balanced", "contiguous")]


def row(lengths):
    """Segment ids and positions of documents of these lengths, cut at the end of the row."""
    ids, positions, at, segment = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32), 0, 0
    for size in lengths:
        here = slice(at, at + abs(size))
        at += abs(size)
        if size > 0:
            segment += 1
            ids[here] = segment
            positions[here] = np.arange(len(ids[here]))
    return ids, positions


def planned(lengths):
    """Lengths of the documents that fit the row: what the plan knows of it."""
    ends = np.cumsum(np.abs(lengths))
    return [abs(size) for size, end in zip(lengths, ends, strict=True) if end <= LENGTH]


def random_batch(rows, seed):
    """A batch with a different number at every place of a token field; half of each index is unused."""
    rng = np.random.default_rng(seed)
    batch = empty_rows(rows, BUDGETS, tiny())
    for name in TOKEN_FIELDS:
        batch[name] = rng.permutation(batch[name].size).reshape(batch[name].shape).astype(batch[name].dtype)
    for name in INDEX_FIELDS:
        used = batch[name].shape[1] // 2
        for slots in batch[name]:
            slots[:used] = np.sort(rng.choice(LENGTH, used, replace=False))
    return batch


@settings(max_examples=50)
@given(st.lists(DOCUMENTS.map(planned), min_size=1, max_size=3), st.sampled_from(PLANS), st.integers(0, 9))
def test_a_dealt_batch_is_the_same_batch_in_another_order(rows, plan, seed):
    batch = random_batch(len(rows), seed)
    dealt = plan.deal(batch, rows)
    assert dealt.keys() == batch.keys()
    for number, documents in enumerate(rows):
        order = plan.order(documents, LENGTH)
        assert sorted(order) == list(range(LENGTH))
        for name in TOKEN_FIELDS:
            np.testing.assert_array_equal(dealt[name][number], batch[name][number][order], err_msg=name)
        for name in INDEX_FIELDS:
            old, new = batch[name][number], dealt[name][number]
            np.testing.assert_array_equal(new == LENGTH, old == LENGTH)
            np.testing.assert_array_equal(order[new[new < LENGTH]], old[old < LENGTH], err_msg=name)
        shards = order.reshape(plan.shards, -1)
        assert (np.diff(shards, axis=1) > 0).all(), "ascending within a shard"
        blocks = shards.reshape(plan.shards, -1, min(BLOCK, shards.shape[1]))
        assert (blocks[..., 0] % BLOCK == 0).all(), "whole blocks"
        assert (np.diff(blocks, axis=2) == 1).all(), "whole blocks"
    for name, values in batch.items():
        assert dealt[name].dtype == values.dtype
        if name not in TOKEN_FIELDS + INDEX_FIELDS or plan.shards == 1 or plan.kind == "contiguous":
            np.testing.assert_array_equal(dealt[name], values)


@jax.jit
def kernel_work(ids, positions):
    """Key blocks the kernel visits for each block of queries."""
    segments = Segments(q_ids=ids, q_pos=positions, kv_ids=ids, kv_pos=positions)
    pairs, _, count = plan_row(segments, causal=True, block_q=BLOCK, block_kv=BLOCK)
    visited = np.arange(pairs.size) < count
    return jax.numpy.zeros(LENGTH // BLOCK, int).at[unpack(pairs)[0]].add(visited)


@settings(max_examples=50)  # the first example compiles
@given(DOCUMENTS, st.sampled_from([1, 4]))
def test_the_work_is_that_of_the_kernels_plan(lengths, shards):
    """Block by block, in the row's own order and dealt: a block keeps its work wherever it goes."""
    ids, positions = row(lengths)
    work = block_work(ids, positions, BLOCK)
    order = ContextPlan(shards, BLOCK).order(planned(lengths), LENGTH)
    np.testing.assert_array_equal(kernel_work(ids[order], positions[order]), work[order[::BLOCK] // BLOCK])


@settings(max_examples=50)
@given(DOCUMENTS)
def test_documents_side_by_side(lengths):
    lengths = planned(lengths)
    for found, expected in zip(lay_documents(lengths, LENGTH), row(lengths), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_example_of_the_docstring():
    work = block_work(*lay_documents([48, 8], 64), 8)
    assert work.tolist() == [1, 2, 3, 4, 5, 6, 1, 0]
    assert deal_blocks(work, 2).tolist() == [[1, 2, 5, 7], [0, 3, 4, 6]]


@given(st.lists(st.integers(0, 128), min_size=16, max_size=16), st.sampled_from([1, 2, 4, 16]))
def test_loads_differ_by_less_than_the_longest_block(work, shards):
    """Where no swap helps, a shard has at most one longest block more than any other."""
    work = np.array(work)
    dealt = deal_blocks(work, shards)
    assert sorted(dealt.ravel()) == list(range(16))
    load = work[dealt].sum(1)
    assert load.max() - load.min() <= work.max()


@pytest.mark.parametrize("mean", [3000, 16000])
def test_released_rows_are_shared_evenly(mean):
    """Log-normal documents, rows of 65536 on 8 shards: the most loaded has at most 1.02 times the mean work."""
    rng = np.random.default_rng(mean)
    for _ in range(15):
        lengths = rng.lognormal(np.log(mean) - 1.2**2 / 2, 1.2, 500).astype(int) + 1
        ends = np.minimum(lengths.cumsum(), 65536)  # a full row: its last document is cut
        lengths = np.diff(np.unique(ends), prepend=0).tolist()
        work = block_work(*lay_documents(lengths, 65536), 512)
        load = work[deal_blocks(work, 8)].sum(1)
        assert load.max() <= 1.02 * load.mean()


def test_a_step_is_dealt(sample_pipeline, sample_codes):
    pipeline = with_config(sample_pipeline, context_block=16)
    whole, dealt = (list(islice(pipeline.steps(sample_codes, context_shards=n), 2)) for n in (1, 4))
    plan = ContextPlan(4, 16)
    for one, other in zip(whole, dealt, strict=True):
        assert one.state == other.state
        documents = [np.bincount(ids[ids > 0])[1:].tolist() for ids in one.batch["segment_ids"]]
        expected = plan.deal(one.batch, documents)
        for name, values in other.batch.items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
        # Slots of pads are found where the indices say, in the dealt row.
        tokens, slots = other.batch["tokens"][0], other.batch["audio_index"][0]
        assert (tokens[slots[slots < 512]] == tiny().tokens.audio_pad).all()
        assert (other.batch["tokens"] != one.batch["tokens"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"data\.budgets\.tokens 768 is not divisible by mesh\.context 2 x data\.context_block 512: every shard"),
        ({"context_block": 0}, r"data\.context_block 0 must be at least 1"),
    ],
)
def test_rows_that_cannot_be_dealt(changes, message):
    config = DataConfig(budgets=Budgets(tokens=768), **changes)
    with pytest.raises(ConfigError, match=message):
        check_context(config, 2)
    check_context(DataConfig(budgets=Budgets(tokens=768), context_block=128), 2)
    check_context(DataConfig(budgets=Budgets(tokens=768)), 1)


def test_a_run_is_refused_before_its_first_step(sample_pipeline, sample_codes):
    refused = pytest.raises(ConfigError, match=r"tokens 512 is not divisible by mesh\.context 2 x .* 512")
    with refused:
        sample_pipeline.steps(sample_codes, context_shards=2)
    with refused:
        TrainingData(sample_pipeline, sample_codes, ALL_ROWS, context_shards=2)
