"""A waveform from a mel alone: as long as the mel says, at the pitch and the loudness that it shows."""

import numpy as np
import pytest

from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.flow.config import FlowConfig
from baichuan_omni_jax.vocoder.griffin_lim import griffin_lim
from data_pipelines.media.features import mel_target

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
