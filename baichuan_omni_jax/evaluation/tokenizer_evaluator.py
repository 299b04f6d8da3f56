"""Takes clips through an audio tokenizer's codes and back, and keeps the numbers of all."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import soxr
from jaxtyping import Bool, Float32

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.evaluation import intelligibility
from baichuan_omni_jax.evaluation.audio_scores import MelWaves, TokenizerScores
from baichuan_omni_jax.evaluation.intelligibility import Clip, RecognitionErrors
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from data_pipelines.errors import SampleError
from data_pipelines.media.features import clip_windows, log_mel, mel_target

FIGURE_CLIPS = 3  # clips whose mels are kept for a figure


class TokenizerEvaluator:
    """Evaluates an audio tokenizer clip by clip: mel error, use of codes, intelligibility, recognized words.

    With a branch `flow` waveforms come from its 24 kHz mel, by the vocoder beside it or by Griffin-Lim; without, from
    the decoder's own mel by Griffin-Lim.

    Attributes:
        clips: how many were counted.
        mels: name, target and decoded mel (frames, bands) of the first `FIGURE_CLIPS` of them.
        scores: sums over windows.
    """

    def __init__(
        self, branches: dict[str, Any], cfg: OmniConfig, recognize: Callable[[np.ndarray, int], str] | None
    ) -> None:
        """Takes `audio_encoder`, `audio_decoder`, perhaps `flow` and `vocoder`; `recognize` is a user's recognizer."""
        self.scores, self._audio = TokenizerScores(branches, cfg), cfg.audio
        self._speech_decoder = SpeechDecoder(branches, cfg) if "flow" in branches else None
        self._waves = MelWaves(self.scores.settings, cfg)
        self._recognitions = (
            {name: RecognitionErrors(recognize) for name in ("original", "from_codes")} if recognize else {}
        )
        self._measures: dict[str, list[float]] = defaultdict(list)
        self.clips, self._seconds = 0, 0.0
        self.mels: list[tuple[str, np.ndarray, np.ndarray]] = []

    def add(self, clip: Clip, skipped: Counter) -> None:
        """Counts one clip. Raises SampleError where it cannot be used; `skipped` counts a recognizer that fails."""
        rate, settings = self._audio.sampling_rate, self.scores.settings
        original, at_target = clip.samples(rate), clip.samples(settings.rate)
        windows = clip_windows(len(original), self._audio)
        if not windows:
            raise SampleError("too_short", f"{clip.name}: {len(original)} samples give no code frame")
        # Window by window: its codes, the mel they give, and the waveform of that.
        targets, mels, waves = [], [], []
        for window in windows:
            start, length = (count * settings.rate // rate for count in (window.start, window.samples))
            target = mel_target(at_target[start : start + length], settings)
            piece = original[window.start : window.start + window.samples]
            codes, mel = self.scores(log_mel(piece, self._audio).T, target)
            targets.append(target[: len(mel)])
            mels.append(mel)
            waves.append(self._speech_decoder.speak(codes).wave if self._speech_decoder else self._waves(mel))
        decoded, covered = join_windows(waves, [window.start for window in windows], len(original), self.rate / rate)
        self._count(clip, original, _resample(decoded, self.rate, rate), covered, skipped)
        if len(self.mels) < FIGURE_CLIPS:
            self.mels.append((clip.name, np.concatenate(targets), np.concatenate(mels)))

    def numbers(self) -> dict[str, Any]:
        """All means, by name; `stoi`, `pesq`, `wer` and `cer` where they could be had."""
        # Recognized words of both recordings, so that the recognizer's own errors are known.
        rates = {name: recognition.rates() for name, recognition in self._recognitions.items()}
        errors = {f"{unit}_{name}": rate for name, own in rates.items() for unit, rate in own.items()}
        measures = {name: float(np.mean(values)) for name, values in self._measures.items()}
        counts = {f"{name}_clips": len(values) for name, values in self._measures.items()}
        total = {"clips": self.clips, "seconds": self._seconds, "waveform": f"{self.rate} Hz by {self.vocoder}"}
        return total | self.scores.means() | measures | counts | errors

    @property
    def rate(self) -> int:
        """Hz of the waveforms."""
        return self._speech_decoder.rate if self._speech_decoder else self.scores.settings.rate

    @property
    def vocoder(self) -> str:
        """What makes the waveforms."""
        return self._speech_decoder.vocoder if self._speech_decoder else self._waves.name

    def _count(
        self, clip: Clip, original: np.ndarray, decoded: np.ndarray, covered: np.ndarray, skipped: Counter
    ) -> None:
        rate = self._audio.sampling_rate
        self.clips, self._seconds = self.clips + 1, self._seconds + len(original) / rate
        # Measures compare sample by sample, of what codes cover; a recognizer hears both recordings whole.
        speech = [
            _resample(samples_with_codes(wave, covered), rate, intelligibility.RATE) for wave in (original, decoded)
        ]
        for name, value in intelligibility.measure(*speech).items():
            self._measures[name].append(value)
        if not self._recognitions or not clip.text:
            return
        pairs = list(zip(self._recognitions.values(), (original, decoded), strict=True))
        try:
            texts = [recognition.recognize(wave, rate) for recognition, wave in pairs]
        except SampleError as error:  # of either: rates of both are of the same clips
            skipped[error.cause] += 1
            return
        for (recognition, _), text in zip(pairs, texts, strict=True):
            recognition.count(text, clip.text)


def join_windows(
    waves: Sequence[np.ndarray], starts: Sequence[int], samples: int, ratio: float = 1.0
) -> tuple[Float32[np.ndarray, " m"], Bool[np.ndarray, " n"]]:
    """Joins windows' waves, each from its own start. Codes hold a little less than a window: silence between them.

    Args:
        waves: one of each window.
        starts: samples of the recording before each window.
        samples: of the recording.
        ratio: samples of the waves for one of the recording.

    Returns:
        The waves in one, and which samples of the recording they cover.
    """
    whole, covered = np.zeros(int(samples * ratio), np.float32), np.zeros(samples, bool)
    for wave, start in zip(waves, starts, strict=True):
        place = whole[int(start * ratio) :][: len(wave)]
        place[:] = wave[: len(place)]
        covered[start : start + int(len(wave) / ratio)] = True
    return whole, covered


def samples_with_codes(wave: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The samples of `wave` that are `covered`; resampling may have cost it one of them."""
    return wave[: len(covered)][covered[: len(wave)]]


def _resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    return wave if rate == wanted else soxr.resample(wave, rate, wanted).astype(np.float32)
