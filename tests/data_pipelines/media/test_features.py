"""Sizes, patches, mel frames and windows against the released processor's."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from baichuan_omni_jax.config import released_images, tiny
from baichuan_omni_jax.config.architecture import AudioConfig, FlowConfig, PixelLimits, PostNetConfig, VisionConfig
from baichuan_omni_jax.config.mel_targets import flow_target, reconstruction_targets
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.features import (
    clip_windows,
    log_mel,
    mel_length,
    mel_target,
    patchify,
    resize_image,
    smart_resize,
    split_windows,
    visual_size,
)
from data_pipelines.media.images import decode_image
from tests.helpers.golden import golden_path
from tests.helpers.small_media import media, noise_image

VISION, AUDIO = VisionConfig(), AudioConfig()


@pytest.fixture(scope="module")
def released():
    return json.loads(golden_path("processor/processor.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def features():
    return load_file(golden_path("processor/features.safetensors"))


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_smart_resize_is_the_released_one(released):
    for case in released["smart_resize"]:
        limits = VISION.image_limits if case["kind"] == "image" else VISION.frame_limits
        if case["resized"] is None:
            with pytest.raises(SampleError, match="aspect ratio"):
                smart_resize(case["height"], case["width"], limits)
        else:
            assert list(smart_resize(case["height"], case["width"], limits)) == case["resized"], case


def test_smart_resize_of_a_narrow_strip_keeps_one_factor_and_the_area():
    limits = PixelLimits(min_pixels=3136, max_pixels=12544)
    assert smart_resize(28, 5600, limits) == (28, 448)
    assert smart_resize(5600, 28, limits) == (448, 28)


def normalised(patches):
    """uint8 (p, 588) -> what the released processor gives, (p, 1176): a still repeated in time, scaled."""
    values = patches.reshape(-1, 3, 196) / 255
    values = (values - np.reshape(VISION.image_mean, (3, 1))) / np.reshape(VISION.image_std, (3, 1))
    return np.repeat(values[:, :, None], 2, axis=2).reshape(len(patches), -1)


@pytest.mark.parametrize("name", ["china_200x133", "flower_90x240", "flower_gray_57x43"])
def test_patches_are_the_released_ones(name, features):
    pixels = decode_image(media(golden_path(f"processor/media/{name}.png")), released_images())
    patches, grid = patchify(resize_image(pixels, *visual_size(*pixels.shape[:2], VISION, frame=False)))
    assert relative_error(normalised(patches), features[f"patches_{name}"]) < 1e-6
    assert [1, *grid.max(0) + 1] == features[f"grid_{name}"].tolist()


def test_patch_order_groups_two_by_two():
    pixels = noise_image(28, 56)
    patches, grid = patchify(pixels)
    assert grid.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    for values, (row, column) in zip(patches, grid, strict=True):
        block = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
        np.testing.assert_array_equal(values.reshape(3, 14, 14), block.transpose(2, 0, 1))


def test_mel_is_the_released_one(features):
    speech = media(golden_path("processor/media/speech_zh.wav"))
    samples = probe_audio(speech, 16000)
    mel = log_mel(decode_audio(speech, samples, 16000), AUDIO)
    assert mel.shape == (128, features["speech_frames"]) == (128, mel_length(samples, AUDIO))
    assert mel.dtype == np.float32
    assert relative_error(mel, features["speech_fbank"]) < 1e-5
    assert [length for _, length in split_windows(8 * samples, AUDIO)] == features["split_lengths"].tolist()


def test_mel_of_a_full_window_and_of_silence():
    noise = np.random.default_rng(0).normal(0, 0.1, 480000).astype(np.float32)
    assert log_mel(noise, AUDIO).shape == (128, 3000)
    silence = log_mel(np.zeros(1600, np.float32), AUDIO)
    np.testing.assert_allclose(silence, np.full((128, 11), -1.5), rtol=1e-6)


def test_audio_lengths_are_the_released_ones(released):
    for case in released["audio_lengths"]:
        frames = case["frames"]
        assert [AUDIO.encoder_length(frames), AUDIO.bridge_length(frames)] == case["encoder_bridge"]


def test_windows_overlap_and_drop_what_is_shorter_than_one_fft():
    overlapping = AudioConfig(split_overlap=2.0)
    assert split_windows(70 * 16000, overlapping) == [(0, 480000), (448000, 480000), (896000, 224000)]
    assert split_windows(58 * 16000, overlapping) == [(0, 480000), (448000, 480000)]
    assert split_windows(480000 + 399, AUDIO) == [(0, 480000)]
    assert split_windows(480000 + 400, AUDIO) == [(0, 480000), (480000, 400)]
    assert split_windows(399, AUDIO) == []


def test_clip_windows_leave_out_what_yields_no_code():
    assert [(w.index, w.mel_frames, w.code_frames) for w in clip_windows(576000, AUDIO)] == [
        (0, 3000, 375),
        (1, 601, 75),
    ]
    assert len(clip_windows(480000 + 500, AUDIO)) == 1
    assert clip_windows(959, AUDIO) == []
    assert clip_windows(960, AUDIO)[0].code_frames == 1


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
