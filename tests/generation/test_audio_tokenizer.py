"""The audio tokenizer as a library: a waveform of any rate to codes and back, one device, no mesh."""

import dataclasses
import functools

import numpy as np
import pytest
import soxr

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.generation.audio_tokenizer import AudioTokenizer
from baichuan_omni_jax.vocoder.model import Vocoder
from tests.helpers.typecheck import unchecked
from tests.helpers.untrained import AUDIO, COMPUTE, FLOW, KEY, POST_NET, VOCODER, untrained

CFG = dataclasses.replace(
    tiny(), audio=AUDIO, post_net=POST_NET, flow=dataclasses.replace(FLOW, in_channels=20, prenet_out_dim=20)
)
SECONDS = np.arange(3 * 44100) / 44100
WAVE = (0.3 * np.sin(2 * np.pi * 300 * SECONDS * (1 + SECONDS))).astype(np.float32)


@functools.cache
def tokenizer() -> AudioTokenizer:
    branches = {
        "audio_encoder": untrained(lambda: AudioEncoderBranch(KEY, AUDIO, COMPUTE)),
        "audio_decoder": untrained(lambda: AudioDecoder(KEY, AUDIO, POST_NET, COMPUTE)),
        "flow": untrained(lambda: FlowDecoder(KEY, CFG.flow, COMPUTE)),
        "vocoder": untrained(lambda: Vocoder(KEY, VOCODER, COMPUTE)),
    }
    return AudioTokenizer(branches, CFG)


def test_codes_of_a_waveform_of_any_rate_type_and_channels():
    """Three seconds in windows of two: 25 and 12 frames, 12.5 a second."""
    codes = tokenizer().encode(WAVE, 44100)
    assert (codes.shape, codes.dtype, tokenizer().code_rate) == ((37, 2), np.int32, 12.5)
    assert len(np.unique(codes[:, 0])) > 1
    resampled = soxr.resample(WAVE, 44100, 16000)
    np.testing.assert_array_equal(tokenizer().encode(resampled, 16000), codes)
    np.testing.assert_array_equal(tokenizer().encode(np.stack([2 * WAVE, 0 * WAVE], 1), 44100), codes)
    whole = np.round(resampled * 32768).astype(np.int16)
    exact = tokenizer().encode((whole / 32768).astype(np.float32), 16000)
    np.testing.assert_array_equal(tokenizer().encode(whole, 16000), exact)


def test_a_clip_too_short_has_no_codes_and_no_codes_are_no_sound():
    codes = tokenizer().encode(WAVE[:100], 44100)
    assert codes.shape == (0, 2)
    assert tokenizer().decode_mel(codes).shape == (0, 6)
    assert tokenizer().decode(codes)[0].shape == (0,)


def test_codes_become_a_mel_and_a_waveform():
    """30 code frames are 119 states at 50 Hz, 148 frames of mel at 62.5 Hz, and as many hops of the vocoder."""
    codes = tokenizer().encode(WAVE, 44100)[:30]
    mel = tokenizer().decode_mel(codes)
    assert mel.shape == (148, 6)
    wave, rate = tokenizer().decode(codes)
    assert (wave.shape, wave.dtype, rate) == ((119 * VOCODER.hop_length,), np.float32, 24000)
    assert np.abs(wave).max() <= VOCODER.audio_limit
    np.testing.assert_array_equal(tokenizer().decode(codes)[0], wave)


def test_from_a_checkpoint_with_the_encoder_alone(tmp_path):
    save_branches(tmp_path / "codes", {"audio_encoder": tokenizer().branches["audio_encoder"]}, CFG)
    loaded = AudioTokenizer.from_checkpoint(str(tmp_path / "codes"))
    codes = tokenizer().encode(WAVE, 44100)
    np.testing.assert_array_equal(loaded.encode(WAVE, 44100), codes)
    with pytest.raises(ConfigError, match="a mel needs the branch audio_decoder"):
        loaded.decode_mel(codes)
    with pytest.raises(ConfigError, match="speech needs the branch audio_decoder"):
        loaded.decode(codes)


def test_errors():
    with pytest.raises(ConfigError, match="needs the branch audio_encoder; there are flow"):
        AudioTokenizer({"flow": None}, CFG)
    with pytest.raises(ValueError, match=r"codes \(1, 2\): expected \(frames, 2\), each below"):
        tokenizer().decode_mel(np.array([[0, 8]]))
    with pytest.raises(ValueError, match="a rate above 0"):
        tokenizer().encode(WAVE, 0)
    with unchecked(), pytest.raises(ValueError, match=r"wave of uint8: expected floating-point samples"):
        tokenizer().encode(np.zeros(1600, np.uint8), 16000)
