"""Blockwise attention against the whole score matrix, and its plan against counting every pair of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typecheck import unchecked

from baichuan_omni_jax.kernels.flash_attention import Segments, flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.plan import FIRST, INTERIOR, LAST, unpack
from baichuan_omni_jax.kernels.flash_attention.reference import visible

LENGTH, BLOCK = 40, 8


def row(lengths: list[int], length: int = LENGTH, *, ids: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids (from 1; or `ids`, 0 for padding) and positions of documents of these lengths, then padding."""
    row_ids, positions, start = np.zeros(length, np.int32), np.zeros(length, np.int32), 0
    for i, size in enumerate(lengths):
        size = min(size, length - start)
        row_ids[start : start + size] = ids[i] if ids else i + 1
        positions[start : start + size] = np.arange(size)
        start += size
    return row_ids, positions


def segments_of(*rows: tuple[np.ndarray, np.ndarray]) -> Segments:
    ids, positions = (jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True))
    return Segments.of_row(ids, positions)


def permuted(segments: Segments, order: list[int], block: int = BLOCK) -> Segments:
    """The row's blocks in another order, as the context plan deals them."""
    return Segments(*(x.reshape(x.shape[0], -1, block)[:, np.array(order)].reshape(x.shape) for x in segments))


def random_inputs(t: int, heads: int, kv_heads: int, rows: int, width: int = 8):
    rng = np.random.default_rng(0)
    shapes = [(rows, t, heads, width), *[(rows, t, kv_heads, width)] * 2, (rows, t, heads, width)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("causal", "implementation", "blocks"))
def value_and_gradients(q, k, v, weights, segments, *, causal, implementation, blocks=(BLOCK, BLOCK)):
    def loss(q, k, v):
        plan = plan_blocks(segments, causal, *blocks) if implementation == "xla" else None
        out = flash_attention(
            q, k, v, segments=segments, plan=plan, causal=causal, scale=0.3, implementation=implementation
        )
        return (out * weights).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_same_as_reference(segments: Segments, *, causal: bool, heads=(4, 2), blocks=(BLOCK, BLOCK)):
    b, t = segments.q_ids.shape
    inputs = random_inputs(t, *heads, rows=b)
    with jax.default_matmul_precision("highest"):
        ours = value_and_gradients(*inputs, segments, causal=causal, implementation="xla", blocks=blocks)
        want = value_and_gradients(*inputs, segments, causal=causal, implementation="reference")
    for one, other in zip(ours, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())
    padding = np.asarray(segments.q_ids) == 0
    for array in ours:
        np.testing.assert_array_equal(np.asarray(array)[padding], 0)


ROWS = (row([13, 1, 20]), row([40]))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_and_padding(causal):
    assert_same_as_reference(segments_of(*ROWS), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_permuted_blocks(causal):
    assert_same_as_reference(permuted(segments_of(*ROWS), [3, 0, 4, 2, 1]), causal=causal)


def test_left_padding():
    ids, positions = row([5, 35], ids=[0, 1])
    assert_same_as_reference(segments_of((ids, positions), row([33])), causal=True)


def test_a_length_that_no_block_divides_and_unequal_blocks():
    assert_same_as_reference(segments_of(row([11, 20], 37)), causal=True, heads=(3, 1), blocks=(16, 8))


def test_a_row_of_padding_only():
    assert_same_as_reference(segments_of(row([]), row([7, 9])), causal=True)


def test_queries_and_keys_of_different_lengths():
    """Four new tokens see what is in a cache of ten."""
    q, k, v, _ = random_inputs(10, 2, 1, rows=1)
    segments = Segments(*(jnp.asarray(x, jnp.int32)[None] for x in ([1] * 4, [6, 7, 8, 9], [1] * 10, list(range(10)))))
    ours, want = (
        flash_attention(q[:, :4], k, v, segments=segments, causal=True, scale=0.3, implementation=name)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(ours, want, atol=1e-5)


@functools.partial(jax.jit, static_argnames="causal")
def planned(segments: Segments, causal: bool):
    plan = plan_blocks(segments, causal, BLOCK, BLOCK)
    return plan.by_query[0, 0], plan.by_key[0, 0], plan.count[0, 0]


def pairs_of(pairs, count) -> tuple[list[tuple[int, int]], np.ndarray]:
    query, key, flags = (np.asarray(x)[: int(count)] for x in unpack(pairs))
    return list(zip(query.tolist(), key.tolist(), strict=True)), flags


def counted(segments: Segments, causal: bool) -> tuple[set, set]:
    """Block pairs with a visible pair of tokens, and those where every pair is visible."""
    mask = np.asarray(visible(segments, causal=causal))[0]
    blocks = mask.reshape(LENGTH // BLOCK, BLOCK, LENGTH // BLOCK, BLOCK)
    return ({tuple(pair.tolist()) for pair in np.argwhere(x)} for x in (blocks.any((1, 3)), blocks.all((1, 3))))


@settings(max_examples=40, deadline=None)
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
    assert {pair for pair, flag in zip(listed, flags, strict=True) if flag & INTERIOR} <= every
    assert {pair for pair, flag in zip(other, other_flags, strict=True) if flag & INTERIOR} <= every
    for pairs, marks, side in ((listed, flags, 0), (other, other_flags, 1)):
        blocks = [pair[side] for pair in pairs]
        for i, block in enumerate(blocks):
            assert bool(marks[i] & FIRST) == (block not in blocks[:i])
            assert bool(marks[i] & LAST) == (block not in blocks[i + 1 :])


def test_interior_blocks_are_found():
    by_query, _, count = planned(segments_of(row([40])), True)
    pairs, flags = pairs_of(by_query, count)
    assert {pair for pair, flag in zip(pairs, flags, strict=True) if flag & INTERIOR} == {
        (i, j) for i in range(5) for j in range(i)
    }


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=0, max_size=8), order=st.permutations(range(LENGTH // BLOCK)))
def test_any_layout(lengths, order):
    assert_same_as_reference(permuted(segments_of(row(lengths), ROWS[0]), order), causal=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "mosaic"}, "'mosaic' is not one of pallas_tpu, pallas_gpu, xla, reference"),
        ({"v": np.zeros((1, 8, 1, 4), np.float32)}, "rows and head dims must agree"),
        ({"k": np.zeros((1, 8, 3, 8), np.float32), "v": np.zeros((1, 8, 3, 8), np.float32)}, "not a multiple of 3"),
        ({"segments": segments_of(row([3], 7))}, r"segments \(1, 7\) x \(1, 7\) do not fit"),
    ],
)
def test_errors(change, message):
    q, k, v, _ = random_inputs(8, 4, 2, rows=1)
    arguments = {"q": q, "k": k, "v": v, "segments": segments_of(row([8], 8)), "implementation": None} | change
    with unchecked(), pytest.raises(ValueError, match=message):
        flash_attention(**{"causal": True, "scale": 1.0, **arguments})


def test_too_many_blocks():
    ids = jax.ShapeDtypeStruct((1, 8193), jnp.int32)
    with pytest.raises(ValueError, match="at most 8192 fit a packed pair"):
        jax.eval_shape(lambda ids: plan_blocks(Segments.of_row(ids, ids), True, 1, 1).count, ids)
