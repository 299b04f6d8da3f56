"""The transform and its inverse end where an item ends; a waveform from a mel alone has its pitch and loudness."""

import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config.architecture import FlowConfig
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.vocoder.layers import istft, stft
from baichuan_omni_jax.vocoder.streaming import griffin_lim
from data_pipelines.media.features import mel_target
from tests.helpers.untrained import normal

SETTINGS = flow_target(FlowConfig())


@pytest.mark.slow  # librosa compiles for 20 s where it was just installed
@pytest.mark.parametrize("pitch", [300, 1500])
def test_a_tone_comes_back(pitch):
    """The strongest frequency to a mel filter's width (100 Hz), the loudness within a factor of 2."""
    tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(12000) / SETTINGS.rate).astype(np.float32)
    wave = griffin_lim(mel_target(tone, SETTINGS), SETTINGS)
    assert len(wave) == 12000
    strongest = np.abs(np.fft.rfft(wave)).argmax() * SETTINGS.rate / len(wave)
    assert abs(strongest - pitch) < 100
    assert 0.5 < np.std(wave) / np.std(tone) < 2


def test_no_frame_is_no_sound():
    assert griffin_lim(np.zeros((0, SETTINGS.mels), np.float32), SETTINGS).shape == (0,)


def test_stft_ends_where_the_item_ends(rng):
    x, lengths = normal(rng, 2, 40), jnp.array([40, 24], jnp.int32)
    sizes = {"n_fft": 16, "hop": 4, "spec": None}
    spectrum = stft(jnp.asarray(x), lengths, **sizes)
    padded = np.pad(x[1, :24], 8, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)
    frames = np.stack([np.fft.rfft(padded[i : i + 16] * hann) for i in range(0, 25, 4)])
    np.testing.assert_allclose(spectrum[1, :7], np.concatenate([frames.real, frames.imag], 1), atol=1e-5)
    np.testing.assert_array_equal(spectrum[1, 7:], 0)
    back = istft(spectrum[..., :9], spectrum[..., 9:], lengths // 4 + 1, **sizes)
    np.testing.assert_allclose(back[0], x[0], atol=1e-5)
    np.testing.assert_allclose(back[1, :24], x[1, :24], atol=1e-5)
