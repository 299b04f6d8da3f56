"""The plan of block pairs against counting every pair of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.kernels.flash_attention import Segments, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.plan import FIRST, INTERIOR, LAST, unpack
from baichuan_omni_jax.kernels.flash_attention.reference import visible
from tests.helpers.layouts import BLOCK, LENGTH, permuted, row, segments_of
from tests.helpers.typecheck import unchecked


@functools.partial(jax.jit, static_argnames="causal")
def planned(segments: Segments, causal: bool):
    plan = plan_blocks(segments, causal, BLOCK, BLOCK)
    return plan.by_query[0, 0], plan.by_key[0, 0], plan.count[0, 0]


def pairs_of(pairs, count) -> tuple[list[tuple[int, int]], np.ndarray]:
    query, key, flags = (np.asarray(x)[: int(count)] for x in unpack(pairs))
    return list(zip(query.tolist(), key.tolist(), strict=True)), flags


def interior_of(pairs: list[tuple[int, int]], flags: np.ndarray) -> set[tuple[int, int]]:
    return {pair for pair, flag in zip(pairs, flags, strict=True) if flag & INTERIOR}


def counted(segments: Segments, causal: bool) -> tuple[set, set]:
    """Block pairs with a visible pair of tokens, and those where every pair is visible."""
    mask = np.asarray(visible(segments, causal=causal))[0]
    blocks = mask.reshape(mask.shape[0] // BLOCK, BLOCK, mask.shape[1] // BLOCK, BLOCK)
    return ({tuple(pair.tolist()) for pair in np.argwhere(x)} for x in (blocks.any((1, 3)), blocks.all((1, 3))))


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=0, max_size=8),
    order=st.permutations(range(LENGTH // BLOCK)),
    causal=st.booleans(),
    ascending=st.booleans(),
)
def test_the_plan_holds_every_visible_pair_of_blocks(lengths, order, causal, ascending):
    """Exactly those while ids ascend in a row, even with blocks permuted; never fewer otherwise."""
    ids = None if ascending else [(7 * i) % 4 for i in range(len(lengths))]
    segments = permuted(segments_of(row(lengths, ids=ids)), order)
    by_query, by_key, count = planned(segments, causal)
    some, every = counted(segments, causal)
    listed, flags = pairs_of(by_query, count)
    other, other_flags = pairs_of(by_key, count)
    assert len(set(listed)) == len(listed)
    assert set(listed) == some if ascending else set(listed) >= some
    assert set(other) == set(listed)
    assert listed == sorted(listed)
    assert other == sorted(other, key=lambda pair: (pair[1], pair[0]))
    assert interior_of(listed, flags) == interior_of(other, other_flags) == every
    for pairs, marks, side in ((listed, flags, 0), (other, other_flags, 1)):
        blocks = [pair[side] for pair in pairs]
        for i, block in enumerate(blocks):
            assert bool(marks[i] & FIRST) == (block not in blocks[:i])
            assert bool(marks[i] & LAST) == (block not in blocks[i + 1 :])


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 25), min_size=0, max_size=8),
    order=st.permutations(range(LENGTH // BLOCK)),
    causal=st.booleans(),
)
def test_a_context_shard_visits_exactly_what_its_queries_see(lengths, order, causal):
    """Two of the five blocks of queries, as one shard holds them, against the whole permuted row of keys."""
    row_segments = permuted(segments_of(row(lengths)), order)
    queries = (x[:, BLOCK : 3 * BLOCK] for x in row_segments[:2])
    segments = Segments(*queries, *row_segments[2:])
    by_query, by_key, count = planned(segments, causal)
    some, every = counted(segments, causal)
    listed, flags = pairs_of(by_query, count)
    assert set(listed) == set(pairs_of(by_key, count)[0]) == some
    assert interior_of(listed, flags) == every


@pytest.mark.parametrize(("causal", "expected"), [(True, {(i, j) for i in range(5) for j in range(i)}), (False, None)])
def test_interior_blocks_of_one_document(causal, expected):
    by_query, _, count = planned(segments_of(row([LENGTH])), causal)
    pairs, flags = pairs_of(by_query, count)
    assert interior_of(pairs, flags) == (expected if causal else set(pairs))


@pytest.mark.slow
def test_the_cost_of_a_plan_grows_with_the_number_of_block_pairs():
    """Four times the pairs of blocks cost about four times the operations, at a fixed length."""

    def flops(block: int) -> float:
        ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

        def build(ids):
            plan = plan_blocks(Segments.from_row(ids, ids), True, block, block)
            return plan.by_query, plan.by_key, plan.count

        return jax.jit(build).lower(ids).compile().cost_analysis()["flops"]

    base = flops(4096)
    assert flops(16) - base < 4.5 * (flops(32) - base)


@pytest.mark.parametrize(
    ("length", "positions", "block", "message"),
    [
        (8, 7, 8, r"query ids \(1, 8\) and positions \(1, 7\) must be the same"),
        (0, 0, 8, r"query ids \(1, 0\)"),
        (8, 8, 0, "blocks of 0 x 0 tokens: at least 1 x 1"),
    ],
)
def test_what_cannot_be_planned(length, positions, block, message):
    ids, positions = jnp.ones((1, length), jnp.int32), jnp.ones((1, positions), jnp.int32)
    with unchecked(), pytest.raises(ValueError, match=message):
        plan_blocks(Segments.from_row(ids, positions), True, block, block)


def test_too_many_blocks():
    ids = jax.ShapeDtypeStruct((1, 8193), jnp.int32)
    with pytest.raises(ValueError, match="at most 8192 fit a packed pair"):
        jax.eval_shape(lambda ids: plan_blocks(Segments.from_row(ids, ids), True, 1, 1).count, ids)
