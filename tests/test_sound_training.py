"""Losses that train the voice: flow matching and mel reconstruction, against what their definitions say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.decoder import DecodedAudio
from baichuan_omni_jax.audio.reconstruction import MelTarget, reconstruction_loss
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.flow.training import flow_losses
from baichuan_omni_jax.nn.param import Compute, named_values, with_values
from baichuan_omni_jax.sharding import make_mesh

COMPUTE, KEY = Compute(attention_block=16, remat="none"), jax.random.key(0)
FLOW = replace(tiny().flow, num_mid_blocks=1, n_blocks=1, prenet_layers=1)


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


def test_reconstruction_counts_valid_frames_at_every_scale():
    """Two clips, decoded mel 0, targets 1 and 2: errors 1 and 2 over valid frames, squares 1 and 4."""
    zeros, lengths = jnp.zeros((2, 6, 3)), jnp.array([6, 3])
    decoded = DecodedAudio(jnp.zeros((2, 4, 8)), jnp.array([4, 2]), zeros, zeros, lengths)
    mel = jnp.stack([jnp.ones((8, 3)), 2 * jnp.ones((8, 3))])
    beyond = jnp.where(jnp.arange(8)[None, :, None] < jnp.array([8, 4])[:, None, None], mel, 99.0)
    targets = [MelTarget(beyond, jnp.array([8, 4])), MelTarget(mel[:, :4], jnp.array([4, 4]))]
    loss, numbers = reconstruction_loss(decoded, targets)
    first = (8 * 1 + 4 * 2) / 12, (8 * 1 + 4 * 4) / 12
    second = (4 * 1 + 4 * 2) / 8, (4 * 1 + 4 * 4) / 8
    np.testing.assert_allclose(loss, 2 * (sum(first) + sum(second)), rtol=1e-6)
    np.testing.assert_allclose(numbers["mel_mae"], first[0], rtol=1e-6)


@pytest.mark.slow
def test_flow_losses_are_those_of_the_definition():
    """An estimator that predicts 0 has the loss E|mel - (1 - s) noise|^2, and no frame past a length counts."""
    decoder = FlowDecoder(KEY, replace(FLOW, sigma_min=0.5), COMPUTE)
    last = jax.tree.map(jnp.zeros_like, named_values(decoder.estimator.final_proj))
    decoder.estimator.final_proj = with_values(decoder.estimator.final_proj, last)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((16, 40, FLOW.prenet_in_dim)), jnp.float32)
    mel = jnp.asarray(3 + rng.standard_normal((16, 40, FLOW.in_channels)), jnp.float32)
    lengths = jnp.asarray(rng.integers(20, 41, 16), jnp.int32)

    @jax.jit
    def losses(mel):
        pair = flow_losses(KEY, decoder, hidden, mel, lengths, condition_dropout=0.2)
        return jnp.stack(pair), decoder.prenet(hidden, lengths)

    (flow, prior), mu = losses(mel)
    assert abs(float(flow) - (3**2 + 1 + 0.5**2)) < 0.2
    real = np.arange(40) < np.asarray(lengths)[:, None]
    np.testing.assert_allclose(prior, np.abs(np.asarray(mu) - np.asarray(mel))[real].mean(), rtol=1e-5)
    spoilt = jnp.where(real[..., None], mel, 1e4)
    np.testing.assert_allclose(losses(spoilt)[0], (flow, prior), rtol=1e-6)


@pytest.mark.slow
def test_flow_gradients_reach_the_pre_net_and_are_finite():
    decoder = FlowDecoder(KEY, FLOW, COMPUTE)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 20, FLOW.prenet_in_dim)), jnp.float32)
    mel = jnp.asarray(rng.standard_normal((2, 20, FLOW.in_channels)), jnp.float32)
    lengths = jnp.array([20, 0])  # an unused slot

    def loss(decoder, dropout):
        return flow_losses(KEY, decoder, hidden, mel, lengths, condition_dropout=dropout)[0]

    gradients, moved = jax.jit(jax.grad(loss)), {}
    for dropout in (0.0, 1.0):
        gradient = gradients(decoder, jnp.float32(dropout))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
        moved[dropout] = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient.prenet))
    assert moved[0.0] > 0
    assert moved[1.0] == 0  # without its condition the estimator teaches the pre-net nothing
