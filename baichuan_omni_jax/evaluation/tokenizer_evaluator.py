"""Takes clips through an audio tokenizer's codes and back, and keeps the numbers of all.

How well speech can be understood afterwards: STOI, PESQ, and what a recognizer makes of it. STOI and PESQ come from
kept libraries (`pystoi`, `pesq`; the extra `evaluate`), each used where it is installed. Clips come from a manifest,
with the text that is spoken in them.
"""

import importlib.util
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from jaxtyping import Bool, Float32

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.evaluation.audio_scores import MelWaves, TokenizerScores
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from data_pipelines.datasets.sources import ANY_FOLDER, media_root
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import read_manifest
from data_pipelines.documents.prompt_writing import text_of
from data_pipelines.documents.prompts import AudioElement, TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.features import clip_windows, log_mel, mel_target
from data_pipelines.media.location import Media, find_media
from data_pipelines.synthesis.filters.rules import count_edits, speech_units, spoken_texts
from data_pipelines.text.spoken_text import language_of

RATE = 16000  # Hz, of both measures
LIBRARIES = {"stoi": "pystoi", "pesq": "pesq"}
SPOKEN_TYPES = ("tts", "itts")

Wave = Float32[np.ndarray, "_"]
Recognizer = Callable[[np.ndarray, int], str]


@dataclass(frozen=True)
class Clip:
    """One audio element of a document; `text` is what is spoken in it, "" where the document does not tell.

    `name` is the document's own, with the element's number where there are several.
    """

    name: str
    media: Media
    text: str

    def samples(self, rate: int) -> Float32[np.ndarray, " t"]:
        """Decodes it: mono, full scale 1, at `rate` Hz. Raises SampleError as `decode_audio`."""
        return decode_audio(self.media, probe_audio(self.media, rate), rate)


def missing_measures() -> list[str]:
    """Makes a sentence for each measure whose library is not installed."""
    return [
        f"{measure} is left out: {package} is not installed (pip install '.[evaluate]', or pip install {package})"
        for measure, package in LIBRARIES.items()
        if importlib.util.find_spec(package) is None
    ]


def measure(original: Wave, again: Wave) -> dict[str, float]:
    """Measures `stoi` (about 0 to 1) and `pesq` (wide band, 1 to 4.6) of speech at `RATE` Hz against what it was.

    The longer one is cut. A measure whose library is missing, or that finds too little speech, is left out.
    """
    # Sample by sample: what one of them has more is cut.
    length = min(len(original), len(again))
    pair = original[:length], again[:length]
    if not pair[0].any():
        return {}
    found = {}
    # A library that is missing leaves its measure out.
    for name, function in (("stoi", _stoi), ("pesq", _pesq)):
        value = function(*pair) if importlib.util.find_spec(LIBRARIES[name]) else None
        if value is not None:
            found[name] = float(value)
    return found


def _stoi(original: Wave, again: Wave) -> float | None:
    from pystoi import stoi

    with warnings.catch_warnings():
        # It warns, and returns 1e-5, where 0.4 s are not left when silence is cut out.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            value = stoi(original, again, RATE)
        except (RuntimeWarning, ValueError):
            return None
    return value if np.isfinite(value) else None


def _pesq(original: Wave, again: Wave) -> float | None:
    from pesq import PesqError, pesq

    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = pesq(RATE, original, again, "wb")
    except (PesqError, ValueError):
        return None
    return value if np.isfinite(value) else None


class RecognitionErrors:
    """Counts a recognizer's errors over many clips: words in English, characters in Chinese; and characters in both.

    `recognizer(samples, rate) -> text` is the user's own.
    """

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        self._counts: dict[str, int] = dict.fromkeys(("word_edits", "words", "character_edits", "characters"), 0)

    def recognize(self, samples: Wave, rate: int) -> str:
        """Recognizes a clip. Raises SampleError "recognizer_failed" where the hook raises, or returns no text."""
        try:
            heard = self._recognizer(samples, rate)
        except Exception as error:  # the user's program may raise anything
            raise SampleError("recognizer_failed", str(error) or type(error).__name__) from error
        if not isinstance(heard, str):
            raise SampleError("recognizer_failed", f"it heard {type(heard).__name__}, not text")
        return heard

    def count(self, recognized: str, spoken: str) -> None:
        """Adds the errors of one clip: the recognized text against what was spoken."""
        language = language_of(spoken) or "en"
        # Words by the clip's language, and characters as in Chinese for all.
        for unit, of in (("word", language), ("character", "zh")):
            truth = speech_units(spoken, of)
            self._counts[f"{unit}_edits"] += count_edits(truth, speech_units(recognized, of))
            self._counts[f"{unit}s"] += len(truth)

    def rates(self) -> dict[str, float]:
        """Returns `wer` and `cer`, edits over units; nothing where nothing was spoken."""
        counts = self._counts
        if not counts["words"]:
            return {}
        return {"wer": counts["word_edits"] / counts["words"], "cer": counts["character_edits"] / counts["characters"]}


def read_clips(
    manifest: Path, root: Path | None, skipped: Counter, trusted: Sequence[Path] = ANY_FOLDER
) -> Iterator[Clip]:
    """Yields the audio of a manifest's documents, in order.

    The text of an `asr` document is what carries loss, of `tts` and `itts` what stands before each audio element.

    Args:
        manifest: the JSON lines file.
        root: where its media lie (None: `sources.media_root` says where).
        skipped: counts by its cause what cannot be read.
        trusted: folders that media may lie in.

    Raises:
        ConfigError: when the manifest cannot be opened.
    """
    # A line that cannot be used is counted, and the others are read.
    for line in read_manifest(manifest.name, manifest.parent, media_root(manifest, root, trusted)):
        try:
            if isinstance(line.document, SampleError):
                raise line.document
            found = _audio_elements(line.document)
        except SampleError as error:
            skipped[error.cause] += 1
            continue
        for number, (element, text) in enumerate(found):
            try:
                media = find_media(element.reference, line.document.media)
            except SampleError as error:
                skipped[error.cause] += 1
                continue
            yield Clip(f"{line.document.id}/{number}" if len(found) > 1 else line.document.id, media, text)


def _audio_elements(document: Document) -> list[tuple[AudioElement, str]]:
    """Lists a document's audio elements with what is spoken in each."""
    elements = parse_prompt(document.text)
    kind = document.type.lower()
    found = [element for element in elements if isinstance(element, AudioElement)]
    # Text to speech says its text before the audio, recognition after it, in what it trains.
    if kind in SPOKEN_TYPES:
        return [(element, text) for text, element in spoken_texts(elements)]
    spoken = (element for element in elements if isinstance(element, TextElement) and element.trainable)
    text = text_of(spoken) if kind == "asr" and len(found) == 1 else ""
    return [(element, text) for element in found]


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
        speech = [_resample(samples_with_codes(wave, covered), rate, RATE) for wave in (original, decoded)]
        for name, value in measure(*speech).items():
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
