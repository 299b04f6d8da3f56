"""How much of speech an audio tokenizer keeps: mel error, use of codes, bitrate, intelligibility, recognised words.

    baichuan-omni evaluate tokenizer --checkpoint DIR --manifest asr.jsonl [--root MEDIA] [--picture page.png]
    baichuan-omni evaluate tokenizer --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --manifest asr.jsonl
        --asr package.module:function --json numbers.json

With a branch `flow` the waveform comes from its 24 kHz mel, by the HiFT vocoder beside it or by Griffin-Lim; without,
from the decoder's own mel (16 kHz) by Griffin-Lim. STOI and PESQ need the extra `evaluate`. `--asr` names your own
recogniser, f(samples, rate) -> text; documents of type asr, tts and itts say what was spoken. Clips that cannot be
used are skipped and counted by their cause.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import soxr

from baichuan_omni_jax.branches import SPEECH_BRANCHES
from baichuan_omni_jax.checkpoint import branch_home, find_checkpoint, parse_spec
from baichuan_omni_jax.cli.common import check_folders
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation import intelligibility
from baichuan_omni_jax.evaluation.clips import Clip, read_clips
from baichuan_omni_jax.evaluation.intelligibility import Recognition
from baichuan_omni_jax.evaluation.tokenizer_scores import TokenizerScores
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.train.mel_waves import MelWaves
from data_pipelines.datasets.sources import trusted_folders
from data_pipelines.errors import SampleError
from data_pipelines.media.features import clip_windows, log_mel, mel_target
from data_pipelines.tools.commands import add_media_arguments, load_function, root_from_options, trusted_from_options

DRAWN = 3  # clips on the picture


def run(options: argparse.Namespace) -> None:
    """Evaluates what the options name. Raises ConfigError naming what cannot be used."""
    options.evaluate(options)


def evaluate_tokenizer(options: argparse.Namespace) -> None:
    """Does what the options ask for. Raises ConfigError naming what cannot be used, also where no clip can be."""
    check_options(options)
    hear = load_function("--asr", options.asr) if options.asr else None
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        branches, cfg = load(options.checkpoint)
        judge = Judge(branches, cfg, hear)
        skipped: Counter = Counter()
        root, trusted = root_from_options(options), trusted_folders(trusted_from_options(options), "--trust")
        for clip in read_clips(options.manifest.expanduser(), root, skipped, trusted):
            if judge.clips == options.limit:
                break
            try:
                judge.add(clip, skipped)
            except SampleError as error:
                skipped[error.cause] += 1
    if not judge.clips:
        raise ConfigError(f"--manifest {options.manifest} holds no clip that can be used: {dict(skipped)}")
    numbers = judge.numbers() | {"skipped": dict(skipped)}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2))
    if options.picture:
        from data_pipelines.tools.figures import draw_tokenizer  # imports matplotlib

        seconds = judge.scores.settings.hop / judge.scores.settings.rate
        draw_tokenizer(judge.drawn, seconds, numbers, cfg.audio.codebook_sizes, options.picture)
    for name, value in numbers.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    for sentence in intelligibility.missing_measures():
        print(sentence)


class Judge:
    """Takes clips through their codes and back, and keeps the numbers of all. `hear` is the user's recogniser."""

    def __init__(self, branches: dict, cfg: OmniConfig, hear: Callable | None) -> None:
        self.scores, self._audio = TokenizerScores(branches, cfg), cfg.audio
        self._speaker = SpeechDecoder(branches, cfg) if "flow" in branches else None
        self._waves = MelWaves(self.scores.settings, cfg)
        self._heard = {name: Recognition(hear) for name in ("original", "from_codes")} if hear else {}
        self._measures = defaultdict(list)
        self.clips, self._seconds, self.drawn = 0, 0.0, []

    def add(self, clip: Clip, skipped: Counter) -> None:
        """One clip. Raises SampleError where it cannot be used; a recogniser that fails is counted in `skipped`."""
        rate, settings = self._audio.sampling_rate, self.scores.settings
        original, at_target = clip.samples(rate), clip.samples(settings.rate)
        windows = clip_windows(len(original), self._audio)
        if not windows:
            raise SampleError("too_short", f"{clip.name}: {len(original)} samples give no code frame")
        targets, mels, waves = [], [], []
        for window in windows:
            start, length = (count * settings.rate // rate for count in (window.start, window.samples))
            target = mel_target(at_target[start : start + length], settings)
            piece = original[window.start : window.start + window.samples]
            codes, mel = self.scores(log_mel(piece, self._audio).T, target)
            targets.append(target[: len(mel)])
            mels.append(mel)
            waves.append(self._speaker.speak(codes).wave if self._speaker else self._waves(mel))
        again, covered = in_place(waves, [window.start for window in windows], len(original), self.rate / rate)
        self._count(clip, original, _resampled(again, self.rate, rate), covered, skipped)
        if len(self.drawn) < DRAWN:
            self.drawn.append((clip.name, np.concatenate(targets), np.concatenate(mels)))

    def numbers(self) -> dict:
        """All means, by name; `stoi`, `pesq`, `wer` and `cer` where they could be had."""
        heard = {f"{unit}_{name}": rate for name, of in self._heard.items() for unit, rate in of.rates().items()}
        measures = {name: float(np.mean(values)) for name, values in self._measures.items()}
        counts = {f"{name}_clips": len(values) for name, values in self._measures.items()}
        total = {"clips": self.clips, "seconds": self._seconds, "waveform": f"{self.rate} Hz by {self.vocoder}"}
        return total | self.scores.means() | measures | counts | heard

    @property
    def rate(self) -> int:
        return self._speaker.rate if self._speaker else self.scores.settings.rate

    @property
    def vocoder(self) -> str:
        return self._speaker.vocoder if self._speaker else self._waves.name

    def _count(
        self, clip: Clip, original: np.ndarray, again: np.ndarray, covered: np.ndarray, skipped: Counter
    ) -> None:
        rate = self._audio.sampling_rate
        self.clips, self._seconds = self.clips + 1, self._seconds + len(original) / rate
        # Measures compare sample by sample, of what codes cover; a recogniser hears both recordings whole.
        speech = [_resampled(of_codes(wave, covered), rate, intelligibility.RATE) for wave in (original, again)]
        for name, value in intelligibility.measure(*speech).items():
            self._measures[name].append(value)
        if not self._heard or not clip.text:
            return
        pairs = list(zip(self._heard.values(), (original, again), strict=True))
        try:
            texts = [recognition.hear(wave, rate) for recognition, wave in pairs]
        except SampleError as error:  # of either: rates of both are of the same clips
            skipped[error.cause] += 1
            return
        for (recognition, _), text in zip(pairs, texts, strict=True):
            recognition.count(text, clip.text)


def in_place(
    waves: Sequence[np.ndarray], starts: Sequence[int], samples: int, ratio: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Joins windows' waves, each from its own start, and returns with them which of the clip's `samples` they cover.

    `starts` and `samples` are the recording's, of which each has `ratio` samples of the waves. Codes hold a little less
    than a window: silence between them.
    """
    whole, covered = np.zeros(int(samples * ratio), np.float32), np.zeros(samples, bool)
    for wave, start in zip(waves, starts, strict=True):
        place = whole[int(start * ratio) :][: len(wave)]
        place[:] = wave[: len(place)]
        covered[start : start + int(len(wave) / ratio)] = True
    return whole, covered


def of_codes(wave: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The samples of `wave` that are `covered`; resampling may have cost it one of them."""
    return wave[: len(covered)][covered[: len(wave)]]


def load(spec: str) -> tuple[dict, OmniConfig]:
    """Encoder and decoder, and flow and its vocoder where there are any. Raises ConfigError naming what is missing."""
    sources = parse_spec(spec, SPEECH_BRANCHES)
    if "=" not in spec and branch_home(find_checkpoint(spec), "flow") is None:
        del sources["flow"]
    by_name = ",".join(f"{name}={folder}" for name, folder in sources.items())
    loaded = load_for_generation(by_name, needed=SPEECH_BRANCHES[:2])
    return loaded.branches, loaded.config


def _resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    return wave if rate == wanted else soxr.resample(wave, rate, wanted).astype(np.float32)


def check_options(options: argparse.Namespace) -> None:
    """Before minutes of work: raises ConfigError for files that could not be written."""
    check_folders(options, "json", "picture")
    if options.picture and find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install '.[show]'")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {options.limit}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_subparsers(required=True, metavar="tokenizer")
    tokenizer = parts.add_parser("tokenizer", help="how much of speech an audio tokenizer keeps", description=__doc__)
    tokenizer.set_defaults(evaluate=evaluate_tokenizer)
    add = tokenizer.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--manifest", metavar="FILE.jsonl", type=Path, required=True, help="documents with the clips")
    add_media_arguments(tokenizer)
    add("--limit", metavar="N", type=int, help="as many clips at most")
    add("--asr", metavar="MODULE:FUNCTION", help="your recogniser, f(samples, rate) -> text")
    add("--picture", metavar="FILE.png", type=Path, help="mels, use of codes, error by level; needs matplotlib")
    add("--json", metavar="FILE.json", type=Path, help="the numbers")
