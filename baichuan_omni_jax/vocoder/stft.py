"""Spectra and waveforms without a network: STFT, its inverse, and Griffin and Lim's iteration for a mel alone.

Periodic Hann window, centered frames, as products with small tables. Each item has its own length: its signal is
mirrored at its own end, and its windows are added up as if it were alone.
"""

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from baichuan_omni_jax.config.mel_targets import HIGHEST, MelTargetSpec
from baichuan_omni_jax.nn.conv import length_mask, mask_padding, overlap_add


def hann(n_fft: int) -> Float[np.ndarray, " n"]:
    """Returns the periodic window: 0.5 - 0.5 cos(2 pi n / n_fft)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def stft(
    x: Float[Array, "b s"], lengths: Int32[Array, " b"], *, n_fft: int, hop: int, spec: PartitionSpec | None
) -> Float[Array, "b t c"]:
    """Transforms signals of `lengths` samples to [real, imaginary] (b, s / hop + 1, n_fft + 2), zero past their end.

    `lengths` and s are multiples of `hop`. The signal is mirrored n_fft / 2 samples beyond both its ends (its last
    sample is not repeated): length 4, n_fft 4: samples 2 1 | 0 1 2 3 | 2 1.
    """
    # Mirrored at the item's own ends by index, since each item ends elsewhere.
    samples = x.shape[1]
    place = jnp.abs(jnp.arange(-(n_fft // 2), samples + n_fft // 2))
    last = lengths[:, None] - 1
    place = jnp.clip(jnp.where(place > last, 2 * last - place, place), 0, samples - 1)
    x = jnp.take_along_axis(x, place, 1)
    # A frame is n_fft / hop blocks of `hop` samples, side by side: no gather.
    frames = samples // hop + 1
    blocks = x.reshape(x.shape[0], x.shape[1] // hop, hop, out_sharding=spec)
    frames_of = jnp.concatenate([blocks[:, i : i + frames] for i in range(n_fft // hop)], -1)
    spectrum = jnp.einsum("btn,nc->btc", frames_of.astype(jnp.float32), _forward_table(n_fft), out_sharding=spec)
    return mask_padding(spectrum, jnp.where(lengths > 0, lengths // hop + 1, 0))


def istft(
    real: Float[Array, "b t c"],
    imaginary: Float[Array, "b t c"],
    frames: Int32[Array, " b"],
    *,
    n_fft: int,
    hop: int,
    spec: PartitionSpec | None,
) -> Float[Array, "b s"]:
    """Transforms to signals (b, (t - 1) hop) spectra (b, t, n_fft / 2 + 1) of which `frames` (b,) are valid.

    Windowed frames are added up and divided by the sum of the squared windows, n_fft / 2 samples cut at each end.
    """
    spectrum = jnp.concatenate([real, imaginary], -1).astype(jnp.float32)
    pieces = jnp.einsum("btc,cn->btn", spectrum, _inverse_table(n_fft), out_sharding=spec)
    # Windows past an item's last frame add nothing, neither to the sum nor to what it is divided by.
    valid = length_mask(frames, real.shape[1])[..., None]
    squares = jnp.where(valid, jnp.asarray(hann(n_fft) ** 2, jnp.float32), 0)
    total, weight = (overlap_add(p[..., None], hop, spec)[..., 0] for p in (jnp.where(valid, pieces, 0), squares))
    cut = slice(n_fft // 2, n_fft // 2 + (real.shape[1] - 1) * hop)
    total, weight = total[:, cut], weight[:, cut]
    return jnp.where(weight > 1e-11, total / jnp.where(weight > 1e-11, weight, 1), 0)


def _forward_table(n_fft: int) -> Float[Array, "n c"]:
    """Returns windowed samples -> [cos, -sin] sums, (n_fft, n_fft + 2)."""
    # Computed in fp64 and rounded once; the table is a constant of the program.
    angles = 2 * np.pi * np.outer(np.arange(n_fft), np.arange(n_fft // 2 + 1)) / n_fft
    table = np.concatenate([np.cos(angles), -np.sin(angles)], 1)
    return jnp.asarray(hann(n_fft)[:, None] * table, jnp.float32)


def _inverse_table(n_fft: int) -> Float[Array, "c n"]:
    """Returns one-sided [real, imaginary] -> windowed samples; all but the ends stand for two frequencies."""
    angles = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft
    twice = np.where(np.arange(n_fft // 2 + 1) % (n_fft // 2) == 0, 1, 2)[:, None] / n_fft
    table = np.concatenate([twice * np.cos(angles), -twice * np.sin(angles)])
    return jnp.asarray(table * hann(n_fft), jnp.float32)


GRIFFIN_LIM_ITERATIONS = 60
GRIFFIN_LIM_REACH = 8  # frames beyond which a sample hardly changes: twice the four that a window is long


def griffin_lim(mel: Float[np.ndarray, "s mels"], settings: MelTargetSpec) -> Float32[np.ndarray, " t"]:
    """Makes samples at `settings.rate` Hz in ±1 without a vocoder: rough, but audible.

    `mel` is a natural-log magnitude mel, of which each frame gives `hop` samples.
    """
    import librosa  # takes a second

    frames = len(mel)
    if not frames:
        return np.zeros(0, np.float32)
    # A mel has neither fine bands nor phase: least squares gives the former, the iteration the latter.
    magnitude = librosa.feature.inverse.mel_to_stft(
        np.exp(mel.T.astype(np.float64)),
        sr=settings.rate,
        n_fft=settings.n_fft,
        power=1.0,
        fmin=0.0,
        fmax=HIGHEST,
    )
    wave = librosa.griffinlim(
        magnitude,
        n_iter=GRIFFIN_LIM_ITERATIONS,
        hop_length=settings.hop,
        n_fft=settings.n_fft,
        center=False,
        random_state=0,
    )
    # The mel's frames begin half a window less half a hop before their samples.
    start = (settings.n_fft - settings.hop) // 2
    wave = np.pad(wave, (0, max(0, start + frames * settings.hop - len(wave))))[start : start + frames * settings.hop]
    return np.clip(wave, -1.0, 1.0).astype(np.float32)
