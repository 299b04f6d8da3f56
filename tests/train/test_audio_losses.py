"""Losses that train the voice: flow matching and mel reconstruction, against what their definitions say."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.audio.decoder import DecodedAudio
from baichuan_omni_jax.audio.mel_training import MelTarget, mel_errors, reconstruction_loss
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.config.architecture import AudioConfig, PostNetConfig
from baichuan_omni_jax.config.mel_targets import reconstruction_ratios, reconstruction_targets
from baichuan_omni_jax.flow.matching import flow_losses
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.media.features import mel_length, mel_target

COMPUTE, KEY = ComputePolicy(attention_block=16, remat="none"), jax.random.key(0)
WAVE = (0.1 * np.random.default_rng(0).standard_normal(48_000)).astype(np.float32)
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


def test_reconstruction_counts_what_codes_cover_at_every_scale():
    """Two clips of 5 and 3 decoded frames, all 0, beside targets 1 and 2: errors 1 and 2, squares 1 and 4.

    At the same rate frames 5, 3 count; at 8/5 of it ceil(5 x 8/5) = 8 and ceil(3 x 8/5) = 5, of which the second clip's
    target has 4. What lies beyond, in either, does not count.
    """
    zeros, lengths = jnp.zeros((2, 6, 3)), jnp.array([5, 3])
    decoded = DecodedAudio(jnp.zeros((2, 4, 8)), jnp.array([4, 2]), zeros, zeros, lengths)
    mel = np.stack([np.ones((10, 3)), 2 * np.ones((10, 3))]).astype(np.float32)

    def beyond(frames, counted):
        return jnp.asarray(
            np.where(np.arange(frames)[None, :, None] < np.array(counted)[:, None, None], mel[:, :frames], 99)
        )

    targets = [MelTarget(beyond(8, (5, 3)), jnp.array([7, 5])), MelTarget(beyond(10, (8, 4)), jnp.array([10, 4]))]
    loss, numbers = reconstruction_loss(decoded, targets, (Fraction(1), Fraction(5, 8)))
    first = (5 * 1 + 3 * 2) / 8, (5 * 1 + 3 * 4) / 8
    second = (8 * 1 + 4 * 2) / 12, (8 * 1 + 4 * 4) / 12
    np.testing.assert_allclose(loss, 2 * (sum(first) + sum(second)), rtol=1e-6)
    np.testing.assert_allclose(numbers["mel_mae"], first[0], rtol=1e-6)


SLOT = 320  # frames of the slots below: 3 s at 100 Hz and more
errors = jax.jit(mel_errors, static_argnums=3)


def in_slot(mel: np.ndarray) -> tuple[jax.Array, jax.Array]:
    padded = np.full((1, SLOT, mel.shape[1]), 77.0, np.float32)
    padded[0, : len(mel)] = mel
    return jnp.asarray(padded), jnp.array([len(mel)], jnp.int32)


def decoded_frames(samples: int, rate: Fraction) -> int:
    """Frames at `rate` that the decoder makes of a clip's code frames: 4 L - 1 states at 50 Hz, rounded down."""
    audio = AudioConfig()
    codes = audio.bridge_length(mel_length(samples, audio))
    return int((4 * codes - 1) * rate / 50) if codes else 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(samples=st.integers(960, 48_000), scale=st.sampled_from([(1024, 256), (400, 160)]))
def test_an_exact_decoder_makes_no_error_whatever_the_length(samples, scale):
    """The clip's true mel at the decoder's own rate, as far as codes reach: MAE 0.000 at either scale, of clips that
    end anywhere within the 80 ms of a code frame.
    """
    wave = WAVE[:samples]
    post_net = PostNetConfig(n_fft=scale[0], hop_length=scale[1], num_mel_bins=8)
    (target,), (ratio,) = reconstruction_targets((scale,), post_net).values(), reconstruction_ratios((scale,), post_net)
    true = mel_target(wave, target)
    made = in_slot(true[: decoded_frames(samples, target.frame_rate)])
    assert int(made[1][0]) > 0
    assert [float(error) for error in errors(*made, MelTarget(*in_slot(true)), ratio)] == [0.0, 0.0]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(samples=st.integers(960, 48_000))
def test_other_rates_are_compared_at_the_same_moments(samples):
    """62.5 Hz beside 100 Hz, where each frame says when it begins: no comparison is off by a frame (16 ms) or more, to
    the end of what codes cover, and the mean is that of a loop over the definition.
    """
    scales, post_net = ((1024, 256), (400, 160)), PostNetConfig(num_mel_bins=8)
    ratio = reconstruction_ratios(scales, post_net)[1]
    made, there = decoded_frames(samples, Fraction(125, 2)), samples // 160
    clock = lambda frames, rate: np.tile(np.arange(frames)[:, None] / rate, (1, 8)).astype(np.float32)  # noqa: E731
    found, _ = errors(*in_slot(clock(made, 62.5)), MelTarget(*in_slot(clock(there, 100))), ratio)
    late = [i / 100 - (i * 5 // 8) / 62.5 for i in range(there) if i * 5 // 8 < made]
    assert 0 <= min(late) <= max(late) < 1 / 62.5
    # The last one counted begins less than a frame before the decoded mel ends.
    assert len(late) == min(there, -(-made * 8 // 5))
    np.testing.assert_allclose(found, np.mean(late), atol=1e-6)


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
