"""Mels that decoders learn to make: the released 24 kHz mel, and the number of frames at any setting."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.config.architecture import FlowConfig, PostNetConfig
from baichuan_omni_jax.config.mel_targets import flow_target, reconstruction_targets
from data_pipelines.media.features import mel_target
from tests.helpers.golden import golden_path


def test_the_24_khz_mel_is_the_released_one():
    """To 1e-5 of the largest value."""
    golden = load_file(golden_path("processor/features.safetensors"))
    wave, expected = golden["wave24k"].reshape(-1), golden["mel24k"]
    expected = expected.reshape(expected.shape[-2:])
    found = mel_target(wave, flow_target(FlowConfig()))
    found = found.T if expected.shape[0] == found.shape[1] else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("samples", [0, 1, 159, 160, 400, 5000, 16000])
def test_frames_at_every_scale(samples):
    wave = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    for settings in reconstruction_targets(((1024, 256), (400, 160)), PostNetConfig()).values():
        mel = mel_target(wave, settings)
        assert mel.shape == (samples // settings.hop, 80)
        assert np.isfinite(mel).all()


def test_part_of_a_clip_has_the_frames_that_the_whole_has_there():
    wave = np.random.default_rng(0).standard_normal(9000).astype(np.float32)
    for settings in reconstruction_targets(((1024, 256), (400, 160)), PostNetConfig()).values():
        whole = mel_target(wave, settings)
        for first, frames in ((0, 5), (7, 9), (20, 400)):
            part = mel_target(wave, settings, first * settings.hop, frames * settings.hop + 3)
            np.testing.assert_array_equal(part, whole[first : first + frames])
    assert mel_target(wave, settings, 9000).shape == mel_target(wave, settings, 9100).shape == (0, 80)


def test_silence_is_the_floor_and_a_tone_its_own_filter():
    settings = flow_target(tiny().flow)
    time = np.arange(24000) / 24000
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    mel = mel_target(tone, settings)
    loudest = mel[25].argmax()
    assert loudest == mel_target(0.1 * tone, settings)[25].argmax()
    np.testing.assert_allclose(mel[25, loudest] - mel_target(0.1 * tone, settings)[25, loudest], np.log(10), atol=1e-3)
    silence = mel_target(np.zeros(24000, np.float32), settings)
    assert silence.max() - silence.min() < 20
    assert silence.max() < mel[25, loudest] - 5
