"""Blockwise attention against the whole score matrix: values, log-sum-exp and the gradients of both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.kernels.flash_attention import BlockPlan, Segments, flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.cases import SMALL
from tests.helpers.layouts import BLOCK, LENGTH, permuted, row, segments_of
from tests.helpers.typecheck import unchecked


def random_inputs(t: int, heads: int, kv_heads: int, rows: int, width: int = 8):
    rng = np.random.default_rng(0)
    shapes = [(rows, t, heads, width), *[(rows, t, kv_heads, width)] * 2, (rows, t, heads, width)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("causal", "implementation", "blocks"))
def value_and_gradients(q, k, v, weights, segments, *, causal, implementation, blocks=(BLOCK, BLOCK)):
    """Output, log-sum-exp, and gradients of a loss of both."""

    def loss(q, k, v):
        plan = plan_blocks(segments, causal, *blocks) if implementation == "xla" else None
        out, lse = flash_attention(
            q,
            k,
            v,
            segments=segments,
            plan=plan,
            causal=causal,
            scale=0.3,
            implementation=implementation,
            return_lse=True,
        )
        return (out * weights).sum() + (lse * weights[..., 0]).sum(), (out, lse)

    (_, values), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *values, *gradients


def assert_same_as_reference(segments: Segments, *, causal: bool, heads=(4, 2), blocks=(BLOCK, BLOCK)):
    b, t = segments.q_ids.shape
    assert_same(random_inputs(t, *heads, rows=b), segments, causal=causal, blocks=blocks)


def assert_same(inputs: list[jax.Array], segments: Segments, *, causal: bool, blocks: tuple[int, int]):
    with jax.default_matmul_precision("highest"):
        ours = value_and_gradients(*inputs, segments, causal=causal, implementation="xla", blocks=blocks)
        want = value_and_gradients(*inputs, segments, causal=causal, implementation="reference")
    padding = np.asarray(segments.q_ids) == 0
    nothing = (0, -1e30, 0, 0, 0)
    for one, other, empty in zip(ours, want, nothing, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[padding], np.float32(empty))
        one, other = (np.asarray(x)[~padding] for x in (one, other))
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max(initial=0))


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


@pytest.mark.slow
def test_queries_and_keys_of_different_lengths():
    """Four new tokens see what is in a cache of ten."""
    q, k, v, _ = random_inputs(10, 2, 1, rows=1)
    segments = Segments(*(jnp.asarray(x, jnp.int32)[None] for x in ([1] * 4, [6, 7, 8, 9], [1] * 10, list(range(10)))))
    ours, want = (
        flash_attention(q[:, :4], k, v, segments=segments, causal=True, scale=0.3, implementation=name)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(ours, want, atol=1e-5)


# Rows that differ in their segments only share what is compiled; the other heads and lengths are for the slow run.
@pytest.mark.parametrize(
    "name",
    [
        *("uneven", "one_document", "padding_only", "permuted_blocks"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llm", "vit", "whisper", "thousand_documents")),
    ],
)
def test_cases(name):
    case = SMALL[name]
    assert_same(case.arrays(), case.segments(), causal=case.heads.causal, blocks=(case.block, case.block))


def test_bfloat16():
    """Against fp32 of the same rounded inputs, to the rounding of the result and of the weights (8 bits)."""
    q, k, v, weights = random_inputs(LENGTH, 4, 2, rows=1)
    segments = segments_of(ROWS[0])
    half = [x.astype(jnp.bfloat16) for x in (q, k, v, weights)]
    exact = [x.astype(jnp.float32) for x in half]
    ours = value_and_gradients(*half, segments, causal=True, implementation="xla")
    want = value_and_gradients(*exact, segments, causal=True, implementation="reference")
    real = np.asarray(segments.q_ids) > 0
    for one, other in zip(ours, want, strict=True):
        one, other = (np.asarray(x, np.float32)[real] for x in (one, other))
        np.testing.assert_allclose(one, other, atol=2e-2 * np.abs(other).max())


@settings(max_examples=10)
@given(lengths=st.lists(st.integers(1, 25), min_size=0, max_size=8), order=st.permutations(range(LENGTH // BLOCK)))
def test_any_layout(lengths, order):
    assert_same_as_reference(permuted(segments_of(row(lengths), ROWS[0]), order), causal=True)


WHOLE = segments_of(row([8], 8))


def empty_plan(rows: int, pairs: int, *, block: int, causal: bool = True) -> BlockPlan:
    listed = jnp.zeros((rows, 1, pairs), jnp.int32)
    return BlockPlan(listed, listed, listed[..., 0], block_q=block, block_kv=block, causal=causal)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "pallas_tpu"}, "attention pallas_tpu needs a tpu; this runs on cpu"),
        ({"implementation": "mosaic"}, "'mosaic' is not one of pallas_tpu, pallas_gpu, xla, reference"),
        ({"v": np.zeros((1, 8, 1, 4), np.float32)}, "rows and head dims must agree"),
        ({"k": np.zeros((1, 8, 3, 8), np.float32), "v": np.zeros((1, 8, 3, 8), np.float32)}, "not a multiple of 3"),
        ({"segments": segments_of(row([3], 7))}, r"segments \(1, 7\) x \(1, 7\) do not fit"),
        ({"q": np.zeros((1, 8, 4), np.float32)}, r"must be \(rows, tokens, heads, head dim\)"),
        (
            dict.fromkeys("kv", np.zeros((1, 8, 0, 8), np.float32)),
            r"must be \(rows, tokens, heads, head dim\), none empty",
        ),
        (dict.fromkeys("qkv", np.zeros((1, 8, 2, 8), np.int32)), "must agree and be floating point"),
        ({"segments": WHOLE._replace(kv_pos=WHOLE.kv_pos[:, :7])}, r"key ids \(1, 8\) and positions \(1, 7\)"),
        ({"segments": WHOLE._replace(q_pos=WHOLE.q_pos * 1.0)}, "query ids int32 and positions float32 must be int32"),
        (
            {"segments": Segments(*WHOLE[:2], *segments_of(row([8], 8), row([8], 8))[2:])},
            "1 rows of queries, 2 of keys",
        ),
        ({"plan": empty_plan(1, 1, block=8, causal=False)}, "built for causal=False, the call asks for causal=True"),
        (
            {"plan": empty_plan(1, 16, block=4)},
            r"plan has \(1, 1, 16\) .* segments \(1, 1, 4\)",
        ),
        ({"plan": empty_plan(2, 1, block=8)}, r"plan has \(2, 1, 1\)"),
    ],
)
def test_errors(change, message):
    q, k, v, _ = random_inputs(8, 4, 2, rows=1)
    arguments = {"q": q, "k": k, "v": v, "segments": WHOLE, "implementation": None} | change
    with unchecked(), pytest.raises(ValueError, match=message):
        flash_attention(**{"causal": True, "scale": 1.0, **arguments})
