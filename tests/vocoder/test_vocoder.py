"""The vocoder untrained: padding, reach, pitch, its configuration, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config.vocoder import (
    VocoderConfig,
    read_vocoder_config,
    tiny_vocoder,
    vocoder_from_json,
    vocoder_to_json,
)
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.vocoder.model import Vocoder, accumulated_turns, divided, reach
from tests.helpers.untrained import COMPUTE, KEY, VOCODER, assert_close, normal, untrained

pytestmark = pytest.mark.usefixtures("exact")
HOP, HARMONICS = VOCODER.hop_length, VOCODER.harmonics
run = jax.jit(lambda vocoder, *inputs: vocoder(*inputs))


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    vocoder = untrained(lambda: Vocoder(KEY, VOCODER, COMPUTE))
    # A bias that makes it speak: untrained pitch is below the threshold of voicing.
    vocoder.f0_predictor.classifier.bias[...] = jnp.full((1,), 150.0)
    # Soft: the untrained body else clips nearly every sample, and what is just below swings with the last bit.
    vocoder.conv_post.weight_g[...] = 0.1 * vocoder.conv_post.weight_g[...]
    return vocoder


def inputs(rng, items: int, frames: int):
    """Mel, phases and noise."""
    return normal(rng, items, frames, 20), normal(rng, items, HARMONICS), normal(rng, items, frames * HOP, HARMONICS)


def test_an_item_in_a_batch_equals_the_item_alone(vocoder, rng):
    mel, phase, noise = inputs(rng, 3, 9)
    wave = run(vocoder, mel, np.array([9, 5, 0], np.int32), phase, noise)
    alone = run(vocoder, mel[1:2, :5], np.array([5], np.int32), phase[1:2], noise[1:2, : 5 * HOP])
    assert_close(wave[1, : 5 * HOP], alone[0])
    np.testing.assert_array_equal(wave[1, 5 * HOP :], 0)
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() <= VOCODER.audio_limit


def test_a_sample_depends_on_later_frames_within_its_reach_alone(vocoder, rng):
    """What a stream relies on: a frame changes nothing that lies more than `reach` frames before it."""
    frames, changed = reach(VOCODER) + 12, reach(VOCODER) + 6
    mel, phase, noise = inputs(rng, 1, frames)
    later, lengths = mel.copy(), np.array([frames], np.int32)
    later[:, changed:] += 1
    one, other = run(vocoder, mel, lengths, phase, noise), run(vocoder, later, lengths, phase, noise)
    sure = (changed - reach(VOCODER)) * HOP
    assert_close(other[:, :sure], one[:, :sure])
    assert np.abs(np.asarray(one - other))[:, changed * HOP :].max() > 1e-4


def test_turns_are_summed_as_in_double_precision(rng):
    """A minute of speech: the whole part reaches 10^5, of which fp32 sums would lose the fraction."""
    f0 = rng.uniform(80, 400, (1, 3000, 1)).astype(np.float32)
    rates = (f0 * np.array([1, 9], np.float32) / np.float32(24000)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda f: divided(f * jnp.array([1.0, 9.0]), 24000))(f0), rates)
    turns = jax.jit(lambda r: accumulated_turns(r, 480))(rates)
    exact = np.repeat(rates, 480, 1).astype(np.float64).cumsum(1)
    wrong = np.asarray(turns) != exact.astype(np.float32) % 1
    assert wrong.mean() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spk_embed": 3}, "spk_embed is not a known field"),
        ({"lrelu_slope": None}, "lrelu_slope = None: expected a number above 0"),
        ({"upsample_rates": [8, 5]}, "upsample_kernel_sizes has 3 entries, upsample_rates 2"),
        ({"upsample_kernel_sizes": [16, 11, 8]}, "upsample_kernel_sizes 8 for rate 3"),
        ({"resblock_dilation_sizes": [1, 3, 5]}, "resblock_dilation_sizes .* expected lists of whole numbers"),
        ({"base_channels": 12}, "base_channels 12 cannot be halved 3 times"),
        ({"istft_params": {"n_fft": 16}}, "istft_params.hop_len is missing"),
        ({"istft_params": {"n_fft": 16, "hop_len": 5}}, "multiple of hop_len 5"),
    ],
)
def test_vocoder_config_is_read_strictly(tmp_path, change, message):
    path = tmp_path / "vocoder_config.json"
    path.write_text(json.dumps(vocoder_to_json(VocoderConfig()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        read_vocoder_config(path)
    assert str(path) in str(error.value)


def test_vocoder_config_round_trip():
    for config in (VocoderConfig(), tiny_vocoder()):
        assert vocoder_from_json(json.loads(json.dumps(vocoder_to_json(config)))) == config
    assert (VocoderConfig().hop_length, VocoderConfig().source_strides) == (480, (15, 3, 1))


def test_errors(vocoder, rng):
    mel, phase, noise = inputs(rng, 3, 9)
    with pytest.raises(ValueError, match="sine_noise"):
        vocoder(jnp.asarray(mel), jnp.array([9, 5, 0], jnp.int32), jnp.asarray(phase), jnp.asarray(noise[:, 1:]))
