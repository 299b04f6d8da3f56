"""A waveform from a mel without a trained vocoder: phases by Griffin and Lim's iteration. Rough, but audible."""

import numpy as np
from jaxtyping import Float, Float32

from baichuan_omni_jax.config.mel_targets import HIGHEST, MelTargetSpec

ITERATIONS = 60
REACH = 8  # frames beyond which a sample hardly changes: twice the four that a window is long


def griffin_lim(mel: Float[np.ndarray, "s mels"], settings: MelTargetSpec) -> Float32[np.ndarray, " t"]:
    """Samples at `settings.rate` Hz in ±1, `hop` for each frame of a natural-log magnitude mel."""
    import librosa  # takes a second

    frames = len(mel)
    if not frames:
        return np.zeros(0, np.float32)
    magnitude = librosa.feature.inverse.mel_to_stft(
        np.exp(mel.T.astype(np.float64)),
        sr=settings.rate,
        n_fft=settings.n_fft,
        power=1.0,
        fmin=0.0,
        fmax=HIGHEST,
    )
    wave = librosa.griffinlim(
        magnitude, n_iter=ITERATIONS, hop_length=settings.hop, n_fft=settings.n_fft, center=False, random_state=0
    )
    # The mel's frames begin half a window less half a hop before their samples.
    start = (settings.n_fft - settings.hop) // 2
    wave = np.pad(wave, (0, max(0, start + frames * settings.hop - len(wave))))[start : start + frames * settings.hop]
    return np.clip(wave, -1.0, 1.0).astype(np.float32)
