"""How much of speech an audio tokenizer keeps: mel error, use of codes, bitrate, intelligibility, recognized words.

    baichuan-omni evaluate tokenizer --checkpoint DIR --manifest asr.jsonl [--root MEDIA] [--plot page.png]
    baichuan-omni evaluate tokenizer --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --manifest asr.jsonl
        --asr package.module:function --json numbers.json

With a branch `flow` the waveform comes from its 24 kHz mel, by the HiFT vocoder beside it or by Griffin-Lim; without,
from the decoder's own mel (16 kHz) by Griffin-Lim. STOI and PESQ need the extra `evaluate`. `--asr` names your own
recognizer, f(samples, rate) -> text; documents of type asr, tts and itts say what was spoken. Clips that cannot be
used are skipped and counted by their cause.
"""

import argparse
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from baichuan_omni_jax.branches import SPEECH_BRANCHES
from baichuan_omni_jax.checkpoint import branch_home, find_checkpoint, parse_spec
from baichuan_omni_jax.cli.common import check_folders
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.intelligibility import missing_measures, read_clips
from baichuan_omni_jax.evaluation.tokenizer_evaluator import TokenizerEvaluator
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.datasets.sources import trusted_folders
from data_pipelines.errors import SampleError
from data_pipelines.tools.commands import add_media_arguments, load_function, root_from_options, trusted_from_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the kinds of evaluation and their flags."""
    # A kind of evaluation each, with flags of its own.
    parts = parser.add_subparsers(required=True, metavar="tokenizer")
    tokenizer = parts.add_parser("tokenizer", help="how much of speech an audio tokenizer keeps", description=__doc__)
    tokenizer.set_defaults(evaluate=evaluate_tokenizer)
    add = tokenizer.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--manifest", metavar="FILE.jsonl", type=Path, required=True, help="documents with the clips")
    add_media_arguments(tokenizer)
    add("--limit", metavar="N", type=int, help="as many clips at most")
    add("--asr", metavar="MODULE:FUNCTION", help="your recognizer, f(samples, rate) -> text")
    add(
        "--plot",
        "--picture",
        metavar="FILE.png",
        type=Path,
        help="mels, use of codes, error by level (extra `show`)",
    )
    add("--json", metavar="FILE.json", type=Path, help="the numbers")


def run(options: argparse.Namespace) -> None:
    """Evaluates what the options name. Raises ConfigError naming what cannot be used."""
    options.evaluate(options)


def evaluate_tokenizer(options: argparse.Namespace) -> None:
    """Does what the options ask for. Raises ConfigError naming what cannot be used, also where no clip can be."""
    # What can be refused without the weights comes first: loading and compiling take minutes.
    check_options(options)
    recognize = load_function("--asr", options.asr) if options.asr else None
    # One device: clips go one by one, so that a clip's numbers do not depend on its neighbors.
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        branches, cfg = load_branches(options.checkpoint)
        evaluator = TokenizerEvaluator(branches, cfg, recognize)
        skipped: Counter = Counter()
        root, trusted = root_from_options(options), trusted_folders(trusted_from_options(options), "--trust")
        for clip in read_clips(options.manifest.expanduser(), root, skipped, trusted):
            if evaluator.clips == options.limit:
                break
            try:
                evaluator.add(clip, skipped)
            except SampleError as error:
                skipped[error.cause] += 1
    if not evaluator.clips:
        raise ConfigError(f"--manifest {options.manifest} holds no clip that can be used: {dict(skipped)}")
    # The same numbers for programs, as a figure, and for people.
    numbers: dict[str, Any] = evaluator.numbers() | {"skipped": dict(skipped)}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2))
    if options.plot:
        from data_pipelines.tools.figures import draw_tokenizer  # imports matplotlib

        seconds = evaluator.scores.settings.hop / evaluator.scores.settings.rate
        draw_tokenizer(evaluator.mels, seconds, numbers, cfg.audio.codebook_sizes, options.plot)
    for name, value in numbers.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    for sentence in missing_measures():
        print(sentence)


def load_branches(spec: str) -> tuple[dict[str, Any], OmniConfig]:
    """Encoder and decoder, and flow and its vocoder where there are any. Raises ConfigError naming what is missing."""
    sources = parse_spec(spec, SPEECH_BRANCHES)
    # A whole checkpoint may do without `flow`; a spec that names it by branch must have it.
    if "=" not in spec and branch_home(find_checkpoint(spec), "flow") is None:
        del sources["flow"]
    by_name = ",".join(f"{name}={folder}" for name, folder in sources.items())
    loaded = load_for_generation(by_name, needed=SPEECH_BRANCHES[:2])
    return loaded.branches, loaded.config


def check_options(options: argparse.Namespace) -> None:
    """Before minutes of work: raises ConfigError for files that could not be written."""
    check_folders(options, "json", "plot")
    if options.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install '.[show]'")
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {options.limit}")
