"""Properties of the language model that hold for any weights, and options that no golden covers; fast, golden-free."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.llm.kv_cache import init_cache
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from tests.helpers.decoding import LENGTH, TOKENS, distance, small_llm, step
from tests.helpers.micro import one_device

ROWS, T = TOKENS.shape


@pytest.fixture(scope="module", autouse=True)
def _mesh():
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def llm(_mesh):
    return small_llm()


@pytest.fixture(scope="module")
def hidden_of(llm):
    """Hidden states (b, t, d) of tokens, positions and segments of the shape of `TOKENS`: one program for all tests."""

    @jax.jit
    def run(tokens, positions, segments):
        spec = llm.compute.rules.spec("batch", "length")
        tokens, positions, segments = (jax.sharding.reshard(x, spec) for x in (tokens, positions, segments))
        return llm(llm.embed(tokens), positions, segments)

    return lambda *arrays: np.asarray(run(*(jnp.asarray(x, jnp.int32) for x in arrays)))


def whole_rows(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row one document."""
    return tokens, np.broadcast_to(np.arange(T), tokens.shape), np.ones_like(tokens)


@pytest.mark.parametrize("cut", [1, 7, T - 1])
def test_causality_no_token_sees_a_later_one(hidden_of, cut):
    changed = TOKENS.copy()
    changed[:, cut:] = (changed[:, cut:] + 1) % 96
    before, after = hidden_of(*whole_rows(TOKENS)), hidden_of(*whole_rows(changed))
    np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
    assert distance(after[:, cut:], before[:, cut:]) > 1e-2


@pytest.mark.parametrize("first", [1, 5, 11])
def test_packing_isolation_a_document_is_computed_as_if_it_were_alone(hidden_of, first):
    """Two documents a row, the second with positions of its own, against the second at the beginning of a row."""
    positions = np.concatenate([np.arange(first), np.arange(T - first)])
    segments = np.where(np.arange(T) < first, 1, 2)
    packed = hidden_of(TOKENS, *(np.broadcast_to(x, TOKENS.shape) for x in (positions, segments)))
    alone = hidden_of(*whole_rows(np.roll(TOKENS, -first, 1)))
    assert distance(packed[:, first:], alone[:, : T - first]) < 1e-5
    # And the other way around: what follows in the row does not show in the first.
    np.testing.assert_array_equal(packed[:, :first], hidden_of(*whole_rows(TOKENS))[:, :first])


@pytest.mark.parametrize("pads", [1, 6])
def test_padding_invariance_left_padded_rows_equal_unpadded_ones(hidden_of, pads):
    mask = np.broadcast_to(np.arange(T) >= pads, TOKENS.shape).astype(int)
    padded = hidden_of(np.roll(TOKENS, pads, 1), np.cumsum(mask, 1), mask)
    assert distance(padded[:, pads:], hidden_of(*whole_rows(TOKENS))[:, : T - pads]) < 1e-5


def test_padding_invariance_what_stands_at_pads_does_not_matter(hidden_of):
    mask = np.broadcast_to(np.arange(T) < 9, TOKENS.shape).astype(int)
    positions, other = np.arange(T) * mask, np.where(mask, TOKENS, (TOKENS + 5) % 96)
    found, again = hidden_of(TOKENS, positions, mask), hidden_of(other, positions, mask)
    np.testing.assert_array_equal(found[:, :9], again[:, :9])


def test_prefill_equals_stepwise_decoding(llm):
    """All rows at once against item by item: the hidden states' logits and, but for rounding, the caches."""
    model = llm.to_decode_layout()
    empty = lambda: init_cache(model.cfg, ROWS, LENGTH, jnp.float32, model.compute)  # noqa: E731
    positions = np.broadcast_to(np.arange(T), TOKENS.shape)
    together, cache = step(model, empty(), TOKENS, positions)
    stepwise = empty()
    for at in range(T):
        logits, stepwise = step(model, stepwise, TOKENS[:, at : at + 1], positions[:, at : at + 1])
        assert distance(logits[:, 0], together[:, at]) < 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), stepwise, cache)


@pytest.mark.slow
def test_norm_head_divides_each_row_of_the_head_by_its_length():
    cfg = replace(tiny().llm, use_norm_head=True, num_layers=1, vocab_size=64)
    model = LanguageModel(jax.random.key(0), cfg, ComputePolicy())
    hidden = jax.random.normal(jax.random.key(1), (1, 4, cfg.hidden_size))
    logits = model.logits(jax.device_put(hidden, jax.NamedSharding(jax.sharding.get_mesh(), jax.P())))
    rows = np.asarray(model.head[...], np.float64)
    expected = np.asarray(hidden, np.float64) @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    assert np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max() < 1e-5
