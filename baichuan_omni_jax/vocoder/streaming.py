"""The waveform of a stretch of speech whose mel comes in parts: windows with room on both sides of what is new.

mel:      |---- reach ----|------- new -------|---- reach ----|
samples:                  |sure, given out now|fade| …held back

`griffin_lim` makes such a window without a vocoder, by Griffin and Lim's iteration.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.config.mel_targets import HIGHEST, MelTargetSpec
from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.nn.param import CLIPS, split_as
from baichuan_omni_jax.vocoder.model import F0_KERNEL, F0_LAYERS, Vocoder, draw_noise

# Mel frames (w, mels) that begin at a frame of the stretch, and whether the stretch ends with them -> samples.
Window = Callable[[np.ndarray, int, bool], np.ndarray]

_F0_REACH = F0_LAYERS * (F0_KERNEL // 2)


class WaveStream:
    """Gives out a stretch window by window. What `reach` frames on either side can change is not given out.

    Each wave it returns begins with the `fade` samples that the one before ended with.
    """

    def __init__(self, window: Window, *, reach: int, hop: int, fade: int):
        self._window, self._reach, self._hop, self._fade = window, reach, hop, fade
        self._margin = reach + -(-fade // hop)
        self._mel: np.ndarray | None = None
        self._first = 0  # the stretch's frame that _mel begins with
        self._spoken = 0

    @staticmethod
    def longest(frames: int, *, reach: int, hop: int, fade: int) -> int:
        """Returns frames of the longest window where no more than `frames` come at once."""
        return 2 * reach + -(-fade // hop) + frames

    def push(self, mel: Float[np.ndarray, "s mels"], last: bool) -> Float32[np.ndarray, " t"]:
        """Returns the samples that the next frames make sure; all that are left where the stretch ends with them."""
        self._mel = mel if self._mel is None else np.concatenate([self._mel, mel])
        end = self._first + len(self._mel)
        until = end if last else end - self._margin
        if until <= self._spoken:
            return np.zeros(0, np.float32)
        # The window begins `reach` frames before what is new, so that the past changes nothing in it.
        start = max(0, self._spoken - self._reach)
        self._mel, self._first = self._mel[start - self._first :], start
        wave = self._window(self._mel, start, last)
        begin = (self._spoken - start) * self._hop
        self._spoken = until
        return wave[begin : (until - start) * self._hop + (0 if last else self._fade)]


class HiftWindow:
    """Runs windows through HiFT: carries past frames' pitch, and how far each sine has turned, to the next window.

    `run` is a compiled `window_wave` with its vocoder, `frames` the size that windows are padded to.
    """

    def __init__(self, run: Callable[..., tuple[Array, Array]], cfg: VocoderConfig, frames: int):
        self._run, self._cfg, self._frames = run, cfg, frames
        self._f0, self._first = np.zeros(0, np.float32), 0
        self._turns = np.zeros(cfg.harmonics)  # fp64, before frame _first

    def __call__(self, mel: Float[np.ndarray, "w mels"], start: int, last: bool) -> Float32[np.ndarray, " t"]:
        # Frames before this window: their turns are summed, their pitch forgotten. Known pitch is not predicted anew.
        passed, known = self._f0[: start - self._first], self._f0[start - self._first :]
        # Turns over whole frames, summed in fp64 of rates in fp32, as the source does.
        multiples = np.arange(1, self._cfg.harmonics + 1, dtype=np.float32)
        rates = passed[:, None] * multiples / np.float32(self._cfg.sampling_rate)
        self._turns = self._turns + (rates.astype(np.float64) * self._cfg.hop_length).sum(0)
        # fp64 as a pair of fp32, which is how the source carries its sums.
        high = self._turns.astype(np.float32)
        before = high[None], (self._turns - high).astype(np.float32)[None]
        padded = np.pad(mel, ((0, self._frames - len(mel)), (0, 0)))[None]
        known_f0 = np.pad(known, (0, self._frames - len(known)))[None]
        counts = np.array([[len(mel)], [len(known)]], np.int32)
        wave, f0 = self._run(padded, *counts, known_f0, before, np.int32(start))
        # The last frames' pitch may still change with what follows.
        sure = len(mel) - (0 if last else _F0_REACH)
        self._f0, self._first = np.asarray(f0)[0, : max(sure, len(known))], start
        return np.asarray(wave)[0, : len(mel) * self._cfg.hop_length]


def window_wave(
    vocoder: Vocoder,
    key: PRNGKeyArray,
    mel: Float[Array, "1 w mels"],
    length: Int32[Array, " 1"],
    known: Int32[Array, " 1"],
    known_f0: Float[Array, "1 w"],
    before: tuple[Float[Array, "1 j"], Float[Array, "1 j"]],
    start: Int32[Array, ""],
) -> tuple[Float[Array, "1 s"], Float[Array, "1 w"]]:
    """Returns waveform and pitch of a window that begins at frame `start` of its stretch.

    The pitch of the first `known` frames is given; `before` (a pair of fp32) are the turns made before the window.
    Noise is each frame's own: a frame sounds alike in every window.
    """
    frames = jnp.arange(mel.shape[1])
    arrays = (mel, length, known, known_f0, before, *draw_noise(key, start + frames, vocoder.cfg))
    mel, length, known, known_f0, before, phase, noise = jax.tree.map(
        lambda x: split_as(x, vocoder.compute, CLIPS), arrays
    )
    # Known pitch stays: predicted anew at a window's edge, it would differ and the sines jump.
    f0 = jnp.where(frames < known[:, None], known_f0, vocoder.f0_predictor(mel, length))
    source = vocoder.source(f0, phase, noise, before)
    return vocoder.filter(mel, length, source), f0


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
