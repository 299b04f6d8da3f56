"""Pauses: where an utterance ends, in quiet and in noise, however the audio is cut into pieces."""

import numpy as np
import pytest

from baichuan_omni_jax.serving.audio import PauseDetector, PauseSettings

RATE = 16000
FRAME = 0.02


def noise(seconds: float, decibels: float, seed: int = 0) -> np.ndarray:
    return (10 ** (decibels / 20) * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(
        np.float32
    )


def speech(seconds: float, decibels: float = -20) -> np.ndarray:
    """Syllables: noise that swells and falls four times a second."""
    wave = noise(seconds, decibels, seed=1)
    return wave * np.abs(np.sin(4 * np.pi * np.arange(len(wave)) / RATE)).astype(np.float32) * np.float32(2**0.5)


def utterances(wave: np.ndarray, piece: int = 4000, detector: PauseDetector | None = None) -> list[np.ndarray]:
    detector = detector or PauseDetector(RATE)
    return [
        utterance for start in range(0, len(wave), piece) for utterance in detector.push(wave[start : start + piece])
    ]


@pytest.mark.parametrize("floor", [-90, -50, -40])
def test_utterances_end_at_pauses(floor):
    """Two sentences with a short breath in the first: two utterances, each with its margins, to 0.1 s."""
    parts = [
        noise(1, floor),
        speech(1),
        noise(0.5, floor),
        speech(1),
        noise(1.2, floor),
        speech(0.5),
        noise(1.2, floor),
    ]
    first, second = utterances(np.concatenate(parts))
    assert len(first) / RATE == pytest.approx(0.3 + 2.5 + 0.3, abs=0.1)
    assert len(second) / RATE == pytest.approx(0.3 + 0.5 + 0.3, abs=0.1)


def test_the_pause_is_noticed_when_it_is_long_enough():
    """The answer begins 0.8 s after the last voiced frame, not later than two frames more."""
    detector = PauseDetector(RATE)
    utterances(np.concatenate([noise(0.5, -60), speech(1)]), detector=detector)
    quiet = noise(1, -60)
    waited = next(n for n in range(1000) if detector.push(quiet[n * 160 : (n + 1) * 160]))
    assert waited * 0.01 == pytest.approx(0.8, abs=0.05)


def test_pieces_do_not_matter():
    wave = np.concatenate([noise(0.5, -60), speech(1), noise(1, -60), speech(0.7), noise(1, -60)])
    whole = utterances(wave, len(wave))
    assert len(whole) == 2
    for piece in (100, 321, 4000):
        assert all(np.array_equal(a, b) for a, b in zip(utterances(wave, piece), whole, strict=True))


@pytest.mark.parametrize(
    "wave",
    [
        np.zeros(5 * RATE, np.float32),
        noise(10, -30),
        np.concatenate([noise(2, -60), noise(0.05, -10), noise(3, -60)]),
        np.zeros(0, np.float32),
    ],
    ids=["silence", "a fan", "a click", "nothing"],
)
def test_no_utterance_in(wave):
    detector = PauseDetector(RATE)
    assert utterances(wave, detector=detector) == []
    assert detector.close() is None


def test_without_a_pause_it_ends_at_the_longest():
    settings = PauseSettings(longest=2.0)
    found = utterances(np.concatenate([noise(0.5, -60), speech(7)]), detector=PauseDetector(RATE, settings))
    assert [len(clip) for clip in found] == [2 * RATE] * 3


def test_switched_off_before_the_pause():
    detector = PauseDetector(RATE)
    assert utterances(np.concatenate([noise(0.5, -60), speech(1)]), detector=detector) == []
    assert len(detector.close()) / RATE == pytest.approx(1.3, abs=0.1)
    assert detector.close() is None


def test_sixteen_bits_and_two_channels():
    wave = np.concatenate([noise(0.5, -60), speech(1), noise(1, -60)])
    (plain,) = utterances(wave)
    (stereo,) = utterances(np.round(np.stack([wave, wave], 1).clip(-1, 1) * 32767).astype(np.int16))
    assert np.abs(plain.clip(-1, 1) - stereo).max() < 1e-3
