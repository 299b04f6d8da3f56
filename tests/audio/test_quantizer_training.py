"""Training of the residual quantizer: the running means, restarts, schedules and gradients it promises."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.quantizer_training import (
    Averaging,
    CodebookState,
    averaging,
    commitment_weight,
    draw_pool,
    kept_levels,
    level_starts,
    move,
    quantize_in_training,
    usage,
)
from baichuan_omni_jax.config import FlowTrainConfig, MeshConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.audio import QuantizerConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh

WIDTH, KEY, COMPUTE = 6, jax.random.key(0), ComputePolicy()
NEAREST = QuantizerConfig(level_dropout=0.0, quantized_share=1.0, init_steps=0, restart_after=0, decay=0.5)


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Compiling is nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def clips(seed=0, m=4, g=7):
    rng = np.random.default_rng(seed)
    valid = np.arange(g) < rng.integers(1, g + 1, (m, 1))
    return jnp.asarray(rng.standard_normal((m, g, WIDTH)), jnp.float32), jnp.asarray(valid)


def codebook(size, seed=1):
    embed = jnp.asarray(np.random.default_rng(seed).standard_normal((size, WIDTH)), jnp.float32)
    return CodebookState(embed, embed, jnp.ones(size), jnp.zeros(size, jnp.int32))


run = jax.jit(quantize_in_training, static_argnums=(5, 6))
moved_by = jax.jit(lambda key, x, valid, *args: move(draw_pool(key, valid), x, valid, *args, COMPUTE))


def train(x, valid, states, schedule=NEAREST, step=5, key=KEY):
    return run(key, x, valid, tuple(states), jnp.int32(step), schedule, COMPUTE)


def test_settings_that_are_refused():
    for change, message in (
        ({"decay": 1.5}, "quantizer.decay 1.5 must lie between 0 and 1"),
        ({"restart_after": -1}, "quantizer.restart_after -1 must be at least 0"),
        ({"temperature": (1.0, -1.0)}, "must be two numbers of at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            QuantizerConfig(**change)
    with pytest.raises(ConfigError, match=r"flow.condition_dropout 2\.0 must lie between 0 and 1"):
        FlowTrainConfig(condition_dropout=2.0)


def test_running_means_are_those_of_the_valid_vectors():
    x, valid = clips()
    state = codebook(5)
    codes = jnp.asarray(np.random.default_rng(2).integers(0, 4, valid.shape), jnp.int32)  # nobody chooses code 4
    moved = moved_by(KEY, x, valid, codes, state, Averaging(0.9, 0.01, 0))
    rows, chosen = np.asarray(x)[np.asarray(valid)], np.asarray(codes)[np.asarray(valid)]
    counts = np.bincount(chosen, minlength=5)
    sums = np.stack([rows[chosen == code].sum(0) for code in range(5)])
    size = 0.9 + 0.1 * counts
    average = 0.99 * (0.9 * np.asarray(state.embed) + 0.1 * sums)
    smoothed = (size + 1e-5) * size.sum() / (size.sum() + 5e-5)
    np.testing.assert_allclose(moved.cluster_size, size, rtol=1e-6)
    np.testing.assert_allclose(moved.embed_avg, average, atol=1e-6)
    np.testing.assert_allclose(moved.embed, average / smoothed[:, None], atol=1e-6)
    np.testing.assert_array_equal(moved.unused, [0, 0, 0, 0, 1])


def test_the_shrink_compounds():
    """c = (1 - b) (a c + (1 - a) m), step by step: with a 0.99 and b 0.01 codes come to rest at half their mean."""
    x, valid = clips()
    codes = jnp.asarray(np.arange(valid.size).reshape(valid.shape) % 2, jnp.int32)
    rows, chosen = np.asarray(x)[np.asarray(valid)], np.asarray(codes)[np.asarray(valid)]
    means = np.stack([rows[chosen == code].mean(0) for code in range(2)])
    counts = np.bincount(chosen, minlength=2)

    @partial(jax.jit, static_argnums=1)
    def after(state, steps):
        pool, how = draw_pool(KEY, valid), Averaging(0.99, 0.01, 0)
        return jax.lax.fori_loop(0, steps, lambda _, state: move(pool, x, valid, codes, state, how, COMPUTE), state)

    state = codebook(2)._replace(cluster_size=jnp.asarray(counts, jnp.float32))
    state = state._replace(embed_avg=state.embed * counts[:, None])
    expected = np.asarray(state.embed, np.float64)
    for _ in range(10):
        expected = 0.99 * (0.99 * expected + 0.01 * means)
    np.testing.assert_allclose(after(state, 10).embed, expected, rtol=1e-4, atol=1e-5)
    rest = np.asarray(after(state, 1000).embed)
    np.testing.assert_allclose(rest, 0.0099 / 0.0199 * means, rtol=1e-3)
    assert np.abs(rest / means - 0.5).max() < 0.005


def test_the_steps_of_k_means_shrink_nothing():
    schedule = QuantizerConfig(shrink=0.01, init_steps=4)
    assert [float(averaging(schedule, jnp.int32(step)).shrink) for step in (0, 3, 4)] == pytest.approx([0, 0, 0.01])


def test_the_commitment_follows_the_quantized_share():
    schedule = QuantizerConfig(quantized_steps=100)
    weights = [float(commitment_weight(0.05, 0.25, schedule, jnp.int32(step))) for step in (0, 50, 100, 900)]
    assert weights == pytest.approx([0.05, 0.15, 0.25, 0.25])
    with pytest.raises(ConfigError, match=r"tokenizer.commitment_start -1.0 must be a finite number of at least 0"):
        TokenizerTrainConfig(commitment_start=-1.0)


def test_levels_are_seeded_with_different_frames():
    """30 vectors for 16, 8 and 4 codes: where one level has a code, the next has none, which would be 0."""
    assert level_starts([64, 48, 32]) == [0, 64, 112]
    x, valid = clips(m=2, g=15)
    valid = valid | True
    schedule = replace(NEAREST, init_steps=2)
    states = train(x, valid, [codebook(16), codebook(8), codebook(4)], schedule, step=0).states
    for state in states:
        rows = np.asarray(state.embed)
        assert np.linalg.norm(rows, axis=1).min() > 1e-3
        assert len(np.unique(rows.round(4), axis=0)) == len(rows)


def test_levels_draw_noise_of_their_own():
    """Three levels with the same, nearly equal codes: the noise alone chooses, and chooses anew for each."""
    x, valid = jnp.zeros((4, 200, WIDTH)), jnp.ones((4, 200), bool)
    same = codebook(8)._replace(embed=1e-6 * codebook(8).embed)
    schedule = replace(NEAREST, temperature=(1.0, 1.0))
    codes = np.asarray(train(x + 1.0, valid, [same] * 3, schedule).codes)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((codes[..., one] == codes[..., other]).mean() - 1 / 8) < 0.05


def test_unused_codes_become_different_vectors_of_the_batch():
    x, valid = clips()
    state = codebook(6)._replace(unused=jnp.array([0, 9, 9, 8, 9, 0]))
    codes = jnp.zeros(valid.shape, jnp.int32)
    moved = moved_by(KEY, x, valid, codes, state, Averaging(0.9, 0.0, 10))
    rows = {tuple(row) for row in np.asarray(x)[np.asarray(valid)].tolist()}
    placed = [tuple(np.asarray(moved.embed[code]).tolist()) for code in (1, 2, 4)]
    assert set(placed) <= rows
    assert len(set(placed)) == 3
    assert tuple(np.asarray(moved.embed[3]).tolist()) not in rows  # one step too early
    np.testing.assert_array_equal(moved.cluster_size[jnp.array([1, 2, 4])], 1.0)
    np.testing.assert_array_equal(moved.unused, [0, 10, 10, 9, 10, 1])  # placed anew, and still not chosen
    assert float(usage(moved, 10)[0]) == 0.5
    again = moved_by(KEY, x, valid, codes, moved, Averaging(0.9, 0.0, 10))
    placed = ~np.isclose(moved.embed, again.embed, atol=1e-3).all(1)
    np.testing.assert_array_equal(placed[1:], [False, False, True, False, False])  # ten more steps for the others


@pytest.mark.parametrize("batch", ["equal", "nothing valid", pytest.param("zeros", marks=pytest.mark.slow)])
def test_degenerate_batches_leave_finite_codebooks(batch):
    """Without a valid vector, in the first step too, codebooks stay as they are."""
    x, valid = clips(m=2)
    x = jnp.ones_like(x) if batch == "equal" else x * 0 if batch == "zeros" else x
    valid = valid & (batch != "nothing valid")
    states = [codebook(8), codebook(4)]
    schedule = QuantizerConfig(restart_after=1, init_steps=3, temperature=(1.0, 0.5))
    for step in range(4):
        result = train(x, valid, states, schedule, step)
        states = result.states
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result))
    if batch == "nothing valid":
        np.testing.assert_array_equal(states[0].embed, codebook(8).embed)


def test_the_first_batch_seeds_and_k_means_follows():
    rng = np.random.default_rng(3)
    centers = 10 * rng.standard_normal((8, WIDTH))
    valid, states = jnp.ones((8, 16), bool), [codebook(24)]
    schedule = QuantizerConfig(init_steps=8, restart_after=50, level_dropout=0.0)
    for step in range(8):
        x = jnp.asarray(centers[rng.integers(0, 8, (8, 16))] + 0.1 * rng.standard_normal((8, 16, WIDTH)), jnp.float32)
        result = train(x, valid, states, schedule, step, jax.random.fold_in(KEY, step))
        states = result.states
    assert float(result.residuals[0]) < 0.02  # the spread within a center is 0.01
    assert len(np.unique(result.codes)) > 0.7 * 24
    _, perplexity = usage(states[0], 1)
    # A trained codebook is not seeded: without steps of k-means the first batch finds its nearest codes.
    first = train(x, valid, [codebook(24)], NEAREST, 0)
    np.testing.assert_array_equal(first.codes, train(x, valid, [codebook(24)], NEAREST, 5).codes)
    assert 8 <= float(perplexity) <= 24


def test_gradient_passes_straight_through_and_commitment_pulls():
    """d(features out)/d(features in) is the identity; d(commitment) is 2 (z - q) / (valid x width)."""
    x, valid = clips()
    states = (codebook(9), codebook(5))
    weights = jnp.asarray(np.random.default_rng(4).standard_normal(x.shape), jnp.float32)

    def losses(x):
        result = train(x, valid, states)
        return jnp.stack([(result.features * weights).sum(), result.commitment])

    passed, pulled = jax.jacrev(losses)(x)
    np.testing.assert_allclose(passed, weights, atol=1e-6)
    codes = np.asarray(train(x, valid, states).codes)
    total = sum(np.asarray(state.embed)[codes[..., q]] for q, state in enumerate(states))
    by_hand = np.where(valid[..., None], 2 * (np.asarray(x) - total) / (int(valid.sum()) * WIDTH), 0)
    np.testing.assert_allclose(pulled, by_hand, atol=1e-6)


def test_nearest_codes_of_what_is_left():
    x, valid = clips()
    states = [codebook(9), codebook(7, seed=2)]
    result, residual = train(x, valid, states), np.asarray(x)
    for q, state in enumerate(states):
        code = ((residual[:, :, None] - np.asarray(state.embed)) ** 2).sum(-1).argmin(-1)
        np.testing.assert_array_equal(result.codes[..., q], np.where(valid, code, 0))
        residual = residual - np.asarray(state.embed)[code]
    seen = np.where(np.asarray(valid)[..., None], np.asarray(x) - residual, 0)
    np.testing.assert_allclose(np.where(valid[..., None], result.features, 0), seen, atol=1e-5)


def test_shares_of_clips_follow_the_schedules():
    schedule = QuantizerConfig(quantized_share=0.1, quantized_steps=100, level_dropout=0.5)
    kept = lambda step: np.asarray(kept_levels(KEY, 4000, 8, jnp.int32(step), schedule))  # noqa: E731
    for step, share in ((0, 0.1), (50, 0.55), (100, 1.0), (1000, 1.0)):
        assert abs(kept(step)[:, 0].mean() - share) < 0.03
    last = kept(100)
    assert (np.diff(last.astype(int), axis=1) <= 0).all()  # a level is kept only with all before it
    counts = np.bincount(last.sum(1), minlength=9) / 4000
    np.testing.assert_allclose(counts[1:8], 0.5 / 8, atol=0.02)


@pytest.mark.slow
def test_temperature_draws_other_codes_and_falls():
    x, valid = clips(m=8, g=20)
    schedule = QuantizerConfig(temperature=(2.0, 0.0), temperature_steps=10, level_dropout=0.0, init_steps=0)
    nearest = np.asarray(train(x, valid, [codebook(32)]).codes)
    share = lambda step: (np.asarray(train(x, valid, [codebook(32)], schedule, step).codes) != nearest).mean()  # noqa: E731
    assert share(1) > 0.3
    assert share(10) == 0
