"""The TPU kernels in interpret mode against the whole score matrix: values, log-sum-exp and all gradients."""

import functools
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.kernels.flash_attention import Segments, pallas_tpu, plan_blocks, reference
from baichuan_omni_jax.kernels.flash_attention.cases import SMALL, Case, Heads
from baichuan_omni_jax.kernels.flash_attention.pallas_tpu_grid import Visits
from baichuan_omni_jax.kernels.flash_attention.plan import FIRST, LAST, unpack
from baichuan_omni_jax.nn.remat import remat
from tests.helpers.proofs import sized
from tests.helpers.typecheck import unchecked

# Of an array's largest value. fp32 products are summed in another order; bf16 rounds the softmax's weights too.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
# Every kind of heads and both types, each once; the full proof has each case in both types.
FEW = [
    ("llm", "float32"),
    ("vit", "bfloat16"),
    ("whisper", "float32"),
    ("uneven", "bfloat16"),
    ("permuted_blocks", "float32"),
]
TINY = Heads(2, 1, 16, causal=True)
WIDE = Heads(2, 2, 16, causal=False)


@functools.partial(jax.jit, static_argnames=("blocks", "causal", "scale"))
def attend(q, k, v, weights, lse_weights, segments, *, blocks, causal, scale):
    """Output, log-sum-exp, dq, dk, dv of a loss that uses both results; by the kernels with these blocks, or by None
    the reference in fp32."""

    def loss(q, k, v):
        if blocks is None:
            q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
            out, lse = reference.attention(q, k, v, segments=segments, causal=causal, scale=scale)
        else:
            plan = plan_blocks(segments, causal, *blocks)
            assert pallas_tpu.unsupported(q, k, plan) is None
            out, lse = pallas_tpu.attention(q, k, v, segments=segments, plan=plan, scale=scale, interpret=True)
        seen = lse > -1e29
        return (out.astype(jnp.float32) * weights).sum() + jnp.where(seen, lse * lse_weights, 0).sum(), (out, lse)

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *results, *gradients


def assert_same_as_reference(case: Case, dtype: str = "float32", blocks: tuple[int, int] | None = None):
    segments = case.segments()
    q, k, v, weights = case.arrays(jnp.dtype(dtype))
    lse_weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape[:3]), jnp.float32)
    run = functools.partial(
        attend, q, k, v, weights, lse_weights, segments, causal=case.heads.causal, scale=case.heads.head_dim**-0.5
    )
    with jax.default_matmul_precision("highest"):
        ours, want = run(blocks=blocks or (case.block, case.block)), run(blocks=None)
    padding = np.asarray(segments.q_ids) == 0
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), ours, want, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        largest = np.abs(other[~padding]).max(initial=0)
        np.testing.assert_allclose(
            one[~padding], other[~padding], atol=TOLERANCE[dtype] * largest, rtol=0, err_msg=name
        )
        np.testing.assert_array_equal(one[padding], np.float32(-1e30) if name == "lse" else 0, err_msg=name)


@pytest.mark.slow
def test_grouped_heads_in_permuted_blocks_and_rows_of_unequal_work():
    """Two rows: the second ends in whole blocks of padding, and has fewer pairs to visit."""
    case = Case("rows", Heads(4, 2, 16, causal=True), 512, 128, ((200, 1, 311), (130, 20)), permuted=True)
    assert_same_as_reference(case)


@pytest.mark.slow
def test_bidirectional_with_unequal_blocks_that_do_not_divide_the_row():
    assert_same_as_reference(Case("rows", WIDE, 300, 128, ((7, 250),)), blocks=(128, 256))


@pytest.mark.slow
def test_padding_only_and_rows_one_at_a_time(monkeypatch):
    """Where the rows' pairs together exceed scalar memory."""
    monkeypatch.setattr(pallas_tpu, "MAX_PAIRS", 4)
    attend.clear_cache()
    assert_same_as_reference(Case("rows", TINY, 256, 128, ((), (256,))))


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("attention_out", 1), ("full", 2)])
def test_remat_that_keeps_the_output_does_not_run_the_forward_kernel_again(policy, runs):
    case = SMALL["uneven"]
    segments, (q, k, v, _) = case.segments(), case.arrays(jnp.dtype("float32"))

    def loss(q, k, v):
        plan = plan_blocks(segments, True, case.block, case.block)
        run = functools.partial(pallas_tpu.attention, segments=segments, plan=plan, scale=1.0, interpret=True)
        return remat(lambda *x: run(*x)[0], policy)(q, k, v).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert forward_kernels(program.jaxpr) == runs


def forward_kernels(jaxpr) -> int:
    """Forward kernels whose results are read; what nothing reads, XLA drops."""
    inputs = [x for eqn in jaxpr.eqns for x in eqn.invars]
    read = {x for x in (*inputs, *jaxpr.outvars) if not isinstance(x, jax.extend.core.Literal)}
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            total += eqn.params["name"] == "forward_kernel" and any(x in read for x in eqn.outvars)
        elif "jaxpr" in eqn.params:
            total += forward_kernels(getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"]))
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), sized(FEW, [(name, dtype) for name in SMALL for dtype in TOLERANCE]))
def test_every_case(name, dtype):
    assert_same_as_reference(SMALL[name], dtype)


@pytest.mark.parametrize("blocks", [(128, 128), (256, 128), (128, 384)])
def test_one_row_and_group_of_heads_is_shared_between_two_cores(blocks):
    """Blocks of several chunks of queries, one that no pair visits, and a second core with less to do."""
    assert_same_as_reference(Case("one", TINY, 640, 128, ((200, 250),), permuted=True), blocks=blocks)


def test_cores_share_the_steps_of_a_row_and_no_block():
    case = Case("rows", TINY, 1024, 128, ((1000,), (100, 30), ()))
    plan = plan_blocks(case.segments(), True, 128, 128)
    for pairs, place in ((plan.by_query[:, 0], 0), (plan.by_key[:, 0], 1)):
        visits = Visits.from_pairs(pairs, plan.count[:, 0])
        bounds = np.asarray(visits.bounds(2))
        assert (np.diff(bounds) > 0).all()
        np.testing.assert_array_equal(bounds[:, ::2], visits.bounds(1))
        for row, (first, middle, end) in zip(pairs, bounds.tolist(), strict=True):
            blocks = np.asarray(unpack(row)[place])
            assert not set(blocks[first:middle]) & set(blocks[middle:end])
            assert set(blocks[first:end]) == set(range(8))
    # Of 36 pairs of one document each core has about half.
    assert 14 <= int(visits.bounds(2)[0, 1]) <= 22


def test_the_plan_lists_blocks_that_see_nothing_after_the_visited():
    ids = jnp.asarray([[0, 0, 1, 1, 0, 0, 2, 0]], jnp.int32)
    plan = jax.jit(lambda ids: plan_blocks(Segments.from_row(ids, ids), False, 2, 2))(ids)
    count = int(plan.count[0, 0])
    for pairs, side in ((plan.by_query, 0), (plan.by_key, 1)):
        blocks, flags = np.asarray(unpack(pairs[0, 0])[side]), np.asarray(unpack(pairs[0, 0])[2])
        assert blocks[:count].tolist() == [1, 3]
        assert blocks[count : count + 2].tolist() == [0, 2]
        assert flags[count : count + 2].tolist() == [FIRST | LAST] * 2
        assert not flags[count + 2 :].any()


@pytest.mark.parametrize(
    ("dtype", "width", "length", "block", "message"),
    [
        ("float16", 64, 512, 128, "only bfloat16 and float32, not float16"),
        ("float32", 72, 512, 128, "the head dim must be a multiple of 16, not 72"),
        ("float32", 64, 512, 64, "blocks must be multiples of 128, not 64 x 64"),
        ("float32", 64, 65536, 128, "262144 block pairs a row; 163840 fit scalar memory"),
    ],
)
def test_what_it_cannot_compute(dtype, width, length, block, message):
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    x = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
    with unchecked():
        plan = jax.eval_shape(lambda ids: plan_blocks(Segments.from_row(ids, ids), True, block, block), ids)
        reason = pallas_tpu.unsupported(x, x, plan)
    assert re.fullmatch(message, reason.split(". ")[0])
