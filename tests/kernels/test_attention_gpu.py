"""The GPU kernels without a GPU: interpreted against the whole score matrix, and lowered for CUDA at real sizes."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from baichuan_omni_jax.kernels.backends import UnsupportedError
from baichuan_omni_jax.kernels.flash_attention import Segments, flash_attention, pallas_gpu, plan_blocks, reference
from baichuan_omni_jax.kernels.flash_attention.cases import REAL, SMALL, Case, Heads
from tests.helpers.proofs import sized
from tests.helpers.typecheck import unchecked

CARD = AbstractDevice("NVIDIA H200", num_cores=132, platform="gpu")
H200 = AbstractMesh((), (), (), abstract_device=CARD)
EIGHT = AbstractMesh((2, 2, 2), ("fsdp", "context", "tensor"), (AxisType.Explicit,) * 3, abstract_device=CARD)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import attention_gpu  # noqa: E402
import rvq_gpu  # noqa: E402

# A head dim that is no power of two, a length that no block divides, padding.
UNEVEN = Case("uneven", Heads(4, 2, 24, causal=True), 200, 64, ((50, 3, 100), (200,)))
BIDIRECTIONAL = Case("bidirectional", Heads(2, 2, 80, causal=False), 192, 64, ((40, 60, 70),))
PERMUTED = Case("permuted", Heads(3, 1, 32, causal=True), 256, 32, ((90, 130, 20),), permuted=True)


@functools.partial(jax.jit, static_argnames=("attend", "causal", "scale", "block"))
def value_and_gradients(q, k, v, d_out, d_lse, segments, *, attend, causal, scale, block):
    """Output, log-sum-exp (zero where nothing is seen) and the gradients through both."""

    def loss(q, k, v):
        if attend is reference.attention:
            out, lse = attend(q, k, v, segments=segments, causal=causal, scale=scale)
        else:
            plan = plan_blocks(segments, causal, block, block)
            out, lse = attend(q, k, v, segments=segments, plan=plan, scale=scale, interpret=True)
        lse = jnp.where(segments.q_ids[..., None] > 0, lse, 0.0)
        return (out.astype(jnp.float32) * d_out).sum() + (lse * d_lse).sum(), (out, lse)

    (_, results), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return *results, *gradients


def assert_same_as_reference(case: Case, *, dtype=jnp.float32, tolerance=1e-5, block: int | None = None):
    """Within `tolerance` of the largest value of the fp32 reference on the same (rounded) inputs; padding is zero."""
    *inputs, d_out = case.arrays(dtype)
    d_lse = jnp.asarray(np.random.default_rng(1).standard_normal(d_out.shape[:3]), jnp.float32)
    segments = case.segments()
    options = {"causal": case.heads.causal, "scale": case.heads.head_dim**-0.5, "block": block or case.block}
    ours = value_and_gradients(*inputs, d_out, d_lse, segments, attend=pallas_gpu.attention, **options)
    exact = [x.astype(jnp.float32) for x in (*inputs, d_out)]
    with jax.default_matmul_precision("highest"):
        want = value_and_gradients(*exact, d_lse, segments, attend=reference.attention, **options)
    padding = np.asarray(segments.q_ids) == 0
    for one, other in zip(ours, want, strict=True):
        one = np.asarray(one, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)
        np.testing.assert_array_equal(one[padding], 0)


@pytest.fixture
def tensor_core_tiles(monkeypatch):
    """fp32 in the tiles of bf16: those that matter, proved to fp32 accuracy."""
    monkeypatch.setattr(pallas_gpu, "_SINGLE", pallas_gpu._HALF)


@pytest.mark.slow
def test_uneven_documents_and_padding():
    assert_same_as_reference(UNEVEN)


@pytest.mark.slow
def test_bidirectional(tensor_core_tiles):
    assert_same_as_reference(BIDIRECTIONAL)


@pytest.mark.slow
@pytest.mark.parametrize("block", [24, 40, 200])
def test_blocks_that_tiles_do_not_divide(block):
    assert_same_as_reference(UNEVEN, block=block)


@pytest.mark.slow
def test_permuted_blocks():
    assert_same_as_reference(PERMUTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sized(("llm", "vit", "uneven", "padding_only"), tuple(SMALL)))
def test_cases(name, tensor_core_tiles):
    assert_same_as_reference(SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sized(("whisper", "permuted_blocks"), tuple(SMALL)))
def test_cases_in_bf16(name):
    """Of fp32's largest value: 8 bits of mantissa, in the weights, the score gradients and the result."""
    assert_same_as_reference(SMALL[name], dtype=jnp.bfloat16, tolerance=2e-2)


@pytest.mark.slow
def test_queries_that_see_nothing_give_zero_and_the_least_log_sum_exp():
    ids, positions = jnp.asarray([[1] * 10 + [0] * 6]), jnp.arange(16)[None]
    q, k, v, _ = (x[:, :16, :1] for x in BIDIRECTIONAL.arrays())
    segments = Segments(ids, positions, ids, positions + 3)
    plan = plan_blocks(segments, True)
    out, lse = pallas_gpu.attention(q, k, v, segments=segments, plan=plan, scale=0.1, interpret=True)
    want, want_lse = reference.attention(q, k, v, segments=segments, causal=True, scale=0.1)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    assert (np.asarray(out)[0, [0, 1, 2, *range(10, 16)]] == 0).all()


def lowered(case: Case, dtype, mesh: AbstractMesh = H200, implementation: str | None = "pallas_gpu") -> str:
    """StableHLO of the forward and backward kernels for absent H200s, asked for through the door."""

    def loss(q, k, v, segments):
        plan = plan_blocks(segments, case.heads.causal, case.block, case.block)
        out, lse = flash_attention(
            q,
            k,
            v,
            segments=segments,
            plan=plan,
            causal=case.heads.causal,
            scale=case.heads.head_dim**-0.5,
            implementation=implementation,
            return_lse=True,
        )
        return out.astype(jnp.float32).sum() + lse.sum()

    def place(shape, dtype):
        sharding = NamedSharding(mesh, P(*mesh.axis_names[: len(shape)])) if mesh.axis_names else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    arrays = [place(x.shape, dtype) for x in case.shapes(dtype)[:3]]
    ids = place((len(case.documents), case.length), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays, Segments(ids, ids, ids, ids))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_three_kernels(text: str):
    assert [text.count(f'name = "flash_attention_{name}"') for name in ("forward", "dq", "dkv")] == [1, 1, 1]


def test_lowers_for_cuda():
    assert_three_kernels(lowered(REAL["vit"], jnp.bfloat16))


def test_each_device_of_a_mesh_attends_from_its_queries_and_heads_to_whole_rows():
    text = lowered(REAL["llm"], jnp.bfloat16, EIGHT, implementation=None)
    assert_three_kernels(text)
    kernel = next(line for line in text.splitlines() if 'name = "flash_attention_forward"' in line)
    assert "tensor<1x32768x14x128xbf16>, tensor<1x65536x2x128xbf16>, tensor<1x65536x2x128xbf16>" in kernel


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", sized(("llm", "whisper"), tuple(REAL)))
def test_real_sizes_lower_for_cuda(name, dtype):
    assert_three_kernels(lowered(REAL[name], dtype))


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [(256, jnp.float32, "head dim 256 is more than 128"), (64, jnp.float8_e4m3fn, "float8_e4m3fn is not bfloat16")],
)
def test_what_it_cannot_compute(width, dtype, message):
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    array = jax.ShapeDtypeStruct((1, 16, 1, width), dtype)

    def attend(q, segments):
        return flash_attention(q, q, q, segments=segments, causal=True, scale=1.0, implementation="pallas_gpu")

    with unchecked(), jax.sharding.use_abstract_mesh(H200), pytest.raises(UnsupportedError, match=message):
        jax.eval_shape(attend, array, Segments(ids, ids, ids, ids))


@pytest.mark.parametrize("script", [attention_gpu, rvq_gpu])
def test_without_a_gpu_the_benchmarks_say_so(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--json"])
    with pytest.raises(SystemExit, match="no GPU: JAX runs on cpu here; nothing was measured"):
        script.main()


def test_results_that_are_no_numbers_are_the_worst_error_of_the_benchmark():
    right = [np.ones(3), np.full(2, 2.0)]
    assert attention_gpu.worst_error([np.ones(3), np.array([2.0, 2.5])], right) == 0.25
    assert attention_gpu.worst_error([np.ones(3), np.array([2.0, np.nan])], right) == np.inf
