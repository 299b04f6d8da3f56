"""Flow matching untrained: causality by chunks, padding, times, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.matching import cosine_times, sample_mel
from baichuan_omni_jax.flow.model import ATTENTION_CHUNK, FlowDecoder, chunk_positions, time_features
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.vocoder.model import Vocoder
from tests.helpers.untrained import (
    AUDIO,
    COMPUTE,
    FLOW,
    KEY,
    POST_NET,
    VOCODER,
    assert_close,
    normal,
    untrained,
)

pytestmark = pytest.mark.usefixtures("exact")
FRAMES = ATTENTION_CHUNK + 30


@pytest.fixture(scope="module")
def decoder() -> FlowDecoder:
    return untrained(lambda: FlowDecoder(KEY, FLOW, COMPUTE))


@jax.jit
def run(decoder, hidden, lengths, noise):
    """The pre-net's mel and a sample around it."""
    return decoder.prenet(hidden, lengths), sample_mel(decoder, hidden, lengths, noise, steps=2)


def test_an_item_in_a_batch_equals_the_item_alone(decoder, rng):
    """Past its length an item keeps its noise."""
    hidden, noise = normal(rng, 2, FRAMES, FLOW.prenet_in_dim), normal(rng, 2, FRAMES, FLOW.in_channels)
    own = FRAMES - 25
    mu, mel = run(decoder, hidden, np.array([FRAMES, own], np.int32), noise)
    mu_alone, mel_alone = run(decoder, hidden[1:, :own], np.array([own], np.int32), noise[1:, :own])
    assert_close(mu[1, :own], mu_alone[0])
    assert_close(mel[1, :own], mel_alone[0])
    np.testing.assert_array_equal(mel[1, own:], noise[1, own:])


def test_temperature_scales_the_noise(decoder, rng):
    """By exactly as much as noise that is given smaller; at 0 the noise is of no account."""
    hidden, lengths = normal(rng, 1, FRAMES, FLOW.prenet_in_dim), np.array([FRAMES], np.int32)
    noise = normal(rng, 1, FRAMES, FLOW.in_channels)

    def at(temperature: float, noise):
        cooled = untrained(lambda: FlowDecoder(KEY, dataclasses.replace(FLOW, temperature=temperature), COMPUTE))
        return run(cooled, hidden, lengths, noise)[1]

    np.testing.assert_array_equal(at(0.5, noise), run(decoder, hidden, lengths, 0.5 * noise)[1])
    np.testing.assert_array_equal(at(0.0, noise), at(0.0, -noise))


def test_a_sample_depends_on_no_later_chunk(decoder, rng):
    """The pre-net is causal frame by frame; the estimator sees the frames of its own chunk of 100 and earlier ones."""
    hidden, noise = normal(rng, 1, FRAMES, FLOW.prenet_in_dim), normal(rng, 1, FRAMES, FLOW.in_channels)
    later, lengths = hidden.copy(), np.array([FRAMES], np.int32)
    later[:, ATTENTION_CHUNK + 10 :] += 1
    (mu, mel), (mu_later, mel_later) = run(decoder, hidden, lengths, noise), run(decoder, later, lengths, noise)
    assert_close(mu_later[:, : ATTENTION_CHUNK + 10], mu[:, : ATTENTION_CHUNK + 10])
    assert_close(mel_later[:, :ATTENTION_CHUNK], mel[:, :ATTENTION_CHUNK])
    assert np.abs(np.asarray(mel_later - mel))[:, ATTENTION_CHUNK + 10 :].max() > 1e-3


def test_times_and_chunks():
    np.testing.assert_allclose(cosine_times(2), [0, 1 - np.sqrt(0.5), 1], atol=1e-6)
    np.testing.assert_allclose(
        time_features(jnp.array([0.002]), 4)[0], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], atol=1e-6
    )
    np.testing.assert_array_equal(chunk_positions(201)[np.array([0, 99, 100, 200])], [0, 0, 1, 2])


def test_codes_to_waveform_in_bfloat16_traces_and_differentiates():
    """Types only, from the audio decoder through flow matching and the vocoder."""
    compute = ComputePolicy(dtype=jnp.dtype("bfloat16"))
    models = jax.eval_shape(
        lambda: (
            AudioDecoder(KEY, AUDIO, POST_NET, compute),
            FlowDecoder(KEY, FLOW, compute),
            Vocoder(KEY, VOCODER, compute),
        )
    )
    lengths = jnp.array([3, 2], jnp.int32)

    def loss(models, x):
        decoder, flow, vocoder = models
        audio = decoder(x, lengths)
        assert audio.hidden.dtype == audio.refined_mel.dtype == jnp.bfloat16
        mel = sample_mel(flow, audio.hidden, audio.hidden_lengths, jnp.zeros((2, 11, FLOW.in_channels)))
        mel = jnp.pad(mel, ((0, 0), (0, 0), (0, VOCODER.in_channels - FLOW.in_channels)))
        noise = jnp.zeros((2, 11 * VOCODER.hop_length, VOCODER.harmonics))
        wave = vocoder(mel, audio.hidden_lengths, jnp.zeros((2, VOCODER.harmonics)), noise)
        assert mel.dtype == wave.dtype == jnp.float32
        return wave.sum() + audio.refined_mel.astype(jnp.float32).sum()

    gradient = jax.eval_shape(jax.grad(loss), models, jnp.zeros((2, 3, AUDIO.code_dim)))
    assert gradient[1].estimator.mid.resnet.time_proj.weight.shape == (1, 32, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": (32, 64)}, "flow.channels .* only one resolution"),
        ({"prenet_out_dim": 24}, "flow.prenet_out_dim 24 must equal flow.in_channels 6"),
    ],
)
def test_unsupported_variants_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: FlowDecoder(KEY, dataclasses.replace(FLOW, **change), COMPUTE))


def test_errors(decoder):
    with pytest.raises(ValueError, match=r"expected \(items, frames, 16\)"):
        decoder.prenet(jnp.zeros((2, 9, 5)), jnp.array([1, 1], jnp.int32))
