"""The kernels as a library: one device, no mesh, no helper; the examples of the docstrings; errors of one sentence."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.kernels import flash_attention as attention_door
from baichuan_omni_jax.kernels import rvq_lookup as rvq_door
from baichuan_omni_jax.kernels.flash_attention import flash_attention, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.plan import Segments
from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from tests.helpers.typecheck import unchecked
from tests.helpers.untrained import assert_close, normal

IDS = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * 24])


@pytest.mark.parametrize("module", [attention_door, rvq_door])
def test_docstring_examples(module):
    done = doctest.testmod(module, extraglobs={"jnp": jnp})
    assert done.attempted > 1
    assert not done.failed


def arrays(rng, tokens: int = 24):
    return [normal(rng, 2, tokens, heads, 16) for heads in (4, 2, 2)]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("causal", [False, True])
def test_equals_dot_product_attention(rng, causal):
    """The same arguments, numpy or JAX, the same result; and so with a mask in place of segment ids."""
    q, k, v = arrays(rng)
    assert_close(flash_attention(q, k, v, causal=causal), jax.nn.dot_product_attention(q, k, v, is_causal=causal))
    mask = (IDS[:, None, :, None] == IDS[:, None, None, :]) & (IDS > 0)[:, None, :, None]
    want = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
    out = flash_attention(q, k, v, segment_ids=IDS, causal=causal)
    assert_close(out[IDS > 0], want[IDS > 0])
    np.testing.assert_array_equal(out[IDS == 0], 0)


def test_a_plan_is_optional(rng):
    q, k, v = map(jnp.asarray, arrays(rng))
    ids, positions = jnp.asarray(IDS, jnp.int32), jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), IDS.shape)
    segments = Segments.from_row(ids, positions)
    plan = plan_blocks(segments, causal=True, block_q=8, block_kv=8)
    shared = flash_attention(q, k, v, segments=segments, plan=plan, causal=True)
    assert_close(shared, flash_attention(q, k, v, segment_ids=IDS, causal=True))


def test_queries_and_keys_of_their_own_lengths(rng):
    (q, _, _), (_, k, v) = arrays(rng, 8), arrays(rng)
    assert_close(flash_attention(q, k, v), jax.nn.dot_product_attention(q, k, v), 1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((24, 4, 16), np.float32)}, r"must be \(rows, tokens, heads, head dim\)"),
        ({"q": np.zeros((2, 24, 3, 16), np.float32)}, "3 query heads are not a multiple of 2 key heads"),
        (
            {"q": np.zeros((2, 8, 4, 16), np.float32), "segment_ids": IDS},
            r"segment_ids \(2, 24\) must be \(rows, tokens\)",
        ),
        ({"segment_ids": IDS[:, :5]}, r"segment_ids \(2, 5\) must be \(rows, tokens\) of q \(2, 24\)"),
        ({"implementation": "cuda"}, "attention implementation 'cuda' is not one of pallas_tpu, pallas_gpu, xla"),
    ],
)
def test_wrong_arguments_get_one_sentence(rng, change, message):
    arguments = dict(zip("qkv", arrays(rng), strict=True)) | change
    with unchecked(), pytest.raises(ValueError, match=message) as error:
        flash_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert "\n" not in str(error.value)


def test_a_lookup_of_numpy_arrays(rng):
    x, book = normal(rng, 5, 4), normal(rng, 7, 4)
    codes, quantized, norms = rvq_lookup(x, [book])
    np.testing.assert_array_equal(codes[:, 0], ((x[:, None] - book) ** 2).sum(-1).argmin(1))
    np.testing.assert_array_equal(quantized, book[codes[:, 0]])
    np.testing.assert_allclose(norms[:, 0], np.linalg.norm(x - book[codes[:, 0]], axis=-1), rtol=1e-5)
