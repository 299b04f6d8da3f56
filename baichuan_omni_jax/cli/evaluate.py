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
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import soundfile
from jaxtyping import Float
from rich.console import Console

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch, WindowEncoder
from baichuan_omni_jax.branches import SPEECH_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import branch_home, find_checkpoint, parse_spec
from baichuan_omni_jax.cli import evaluate_suites
from baichuan_omni_jax.cli.common import check_folders, quiet_logs
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.evaluation.finished_run import evaluate_run
from baichuan_omni_jax.evaluation.tokenizer_evaluator import TokenizerEvaluator, missing_measures, read_clips
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.generation.speech_decoder import CrossFade, DecodedSpeech, SpeechDecoder
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.storage import parse_path
from baichuan_omni_jax.storage.given import given_file, given_folder, given_input, given_manifest
from data_pipelines.datasets.sources import trusted_folders
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.features import Window, clip_windows, log_mel, mel_target
from data_pipelines.media.location import Media
from data_pipelines.tools.commands import add_media_arguments, load_function, root_from_options, trusted_from_options


def add_ability_arguments(parts: argparse._SubParsersAction) -> None:
    """Adds the evaluation of a run's abilities, and its flags."""
    what = "puts the held-out questions of a run to it, or to another checkpoint, and speaks its answers"
    parser = parts.add_parser("abilities", help=what, description=what)
    parser.set_defaults(evaluate=evaluate_abilities)
    add = parser.add_argument
    about = "whose eval.abilities are asked; may be a URL"
    add("--run", dest="workdir", required=True, metavar="DIR", help=about)
    add("--checkpoint", default="", metavar="DIR|branch=DIR,...", help="what answers (default: the run)")
    add("--out", required=True, type=given_folder, metavar="DIR", help="for abilities.json, samples.jsonl and speech/")
    add("--items", type=int, default=200, metavar="N", help="questions of each ability at most (default %(default)s)")


def evaluate_abilities(options: argparse.Namespace) -> None:
    """Asks the abilities of a run. Raises ConfigError, and RunStoppedError where a file cannot be written."""
    if options.items < 1:
        raise ConfigError(f"--items must be at least 1, not {options.items}")
    quiet_logs()
    try:
        evaluate_run(parse_path(options.workdir), options.checkpoint, options.out, options.items, Console())
    # libsndfile has an error of its own for a full disk.
    except (OSError, soundfile.SoundFileError) as error:
        raise RunStoppedError(f"--out {options.out}: {error}; the same command begins again") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of suites, and the other kinds of evaluation as words with flags of their own."""
    parser.description = evaluate_suites.__doc__
    # Suites need no word before their flags, so that the flags of both parsers may have one name.
    evaluate_suites.add_suite_arguments(parser)
    parser.set_defaults(evaluate=evaluate_suites.run_suites)
    parts = parser.add_subparsers(required=False, metavar="tokenizer | abilities")
    add_ability_arguments(parts)
    tokenizer = parts.add_parser("tokenizer", help="how much of speech an audio tokenizer keeps", description=__doc__)
    tokenizer.set_defaults(evaluate=evaluate_tokenizer)
    add = tokenizer.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--manifest", metavar="FILE.jsonl", type=given_manifest, required=True, help="documents with the clips")
    add_media_arguments(tokenizer)
    add("--limit", metavar="N", type=int, help="as many clips at most")
    add("--asr", metavar="MODULE:FUNCTION", help="your recognizer, f(samples, rate) -> text")
    add(
        "--plot",
        "--picture",
        metavar="FILE.png",
        type=given_file,
        help="mels, use of codes, error by level (extra `show`)",
    )
    add("--json", metavar="FILE.json", type=given_file, help="the numbers")


def run(options: argparse.Namespace) -> int | None:
    """Evaluates what the options name; returns the exit code. Raises ConfigError naming what cannot be used."""
    return options.evaluate(options)


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


def add_resynthesize_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `resynthesize`."""
    add = parser.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--audio", metavar="FILE", type=given_input, required=True, help="the recording")
    add("--out", metavar="FILE.wav", type=given_file, required=True, help="where the waveform goes")
    add("--plot", "--picture", metavar="FILE.png", type=given_file, help="both mels (extra `show`)")
    add("--codes", metavar="FILE.npy", type=given_file, help="the codes, int32 (frames, levels)")


def run_resynthesize(options: argparse.Namespace) -> None:
    """Turns a recording into codes, and the codes alone back: codes → mel → 24 kHz waveform.

        baichuan-omni resynthesize --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --audio in.wav
            --out out.wav [--plot mels.png] [--codes codes.npy]

    DIR is a checkpoint or a workdir. Where the checkpoint of `flow` also has a vocoder (HiFT), that makes the waveform,
    else Griffin-Lim; the last line says which. Recordings beyond 30 s go window by window.
    """
    # Before minutes of work: files that could not be written.
    check_folders(options, "out", "plot", "codes")
    if options.out.suffix.lower() != ".wav":
        raise ConfigError(f"--out {options.out}: waveforms are written as .wav")
    if options.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install '.[show]'")
    # By branch, also where one checkpoint has them all: a vocoder may be missing, the others may not.
    sources = parse_spec(options.checkpoint, (*SPEECH_BRANCHES, VOCODER_BRANCH))
    loaded = load_for_generation(
        ",".join(f"{name}={folder}" for name, folder in sources.items()), needed=SPEECH_BRANCHES
    )
    cfg, decoder = loaded.config, SpeechDecoder(loaded.branches, loaded.config)
    # Waveform to codes, window by window; the encoder returns them in the order in which they are done.
    windows, mels = read_windows(options.audio, cfg)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        # `load_for_generation` makes each branch by the table, which says this type of it.
        encoder = cast(AudioEncoderBranch, loaded.branches["audio_encoder"])
        encode = WindowEncoder(encoder, mesh, windows_per_device=1)
        by_window = dict(encode((i, mel.T) for i, mel in enumerate(mels)))
    codes = [by_window[i] for i in range(len(mels))]
    # And back: each window by itself, joined by cross-fades.
    pieces = [decoder.speak(window) for window in codes]
    fade = CrossFade(decoder.fade)
    wave = np.concatenate([*(fade.push(piece.wave) for piece in pieces), fade.close()])
    soundfile.write(options.out, wave, decoder.rate)
    frames = np.concatenate(codes)
    if options.codes:
        np.save(options.codes, frames)
    if options.plot:
        _plot(options, pieces, windows, cfg)
    if loaded.untrained:
        print(f"untrained: {', '.join(loaded.untrained)}")
    seconds = len(wave) / decoder.rate
    print(f"{options.out}: {seconds:.1f} s at {decoder.rate} Hz from {len(frames)} code frames, by {decoder.vocoder}")


def read_windows(path: Path, cfg: OmniConfig) -> tuple[list[Window], list[np.ndarray]]:
    """A recording's windows and their log mels (frames, mels). Raises ConfigError when it cannot be used."""
    media, audio = Media(str(path), path), cfg.audio
    try:
        wave = decode_audio(media, probe_audio(media, audio.sampling_rate), audio.sampling_rate)
    except SampleError as error:
        raise ConfigError(f"--audio: {error}") from error
    windows = clip_windows(len(wave), audio)
    if not windows:
        raise ConfigError(f"--audio {path} is too short: {len(wave)} samples give no code frame")
    return windows, [log_mel(wave[window.start : window.start + window.samples], audio).T for window in windows]


def _plot(options: argparse.Namespace, pieces: list[DecodedSpeech], windows: list[Window], cfg: OmniConfig) -> None:
    """The recording's 24 kHz mel above the one that was made, each window of which stands where it was."""
    # Both mels by the settings of flow matching's target, whatever rate the recording has.
    settings, media = flow_target(cfg.flow), Media(str(options.audio), options.audio)
    wave = decode_audio(media, probe_audio(media, settings.rate), settings.rate)
    recorded, seconds = mel_target(wave, settings), settings.hop / settings.rate
    starts = [round(window.start / cfg.audio.sampling_rate / seconds) for window in windows]
    made = mels_in_place([piece.mel for piece in pieces], starts, recorded)
    draw_mels({"recorded": recorded, "from its codes": made}, seconds, options.plot)


def mels_in_place(mels: list[np.ndarray], starts: list[int], like: np.ndarray) -> np.ndarray:
    """Windows' mels as one as long as `like`, each from its own start; NaN where no code is."""
    whole = np.full_like(like, np.nan)
    for mel, start in zip(mels, starts, strict=True):
        place = whole[start : start + len(mel)]
        place[:] = mel[: len(place)]
    return whole


def draw_mels(mels: Mapping[str, Float[np.ndarray, "_ mels"]], seconds: float, out: Path) -> None:
    """Draws each mel (frames, mels) of `seconds` a frame under its name into the file `out`; NaN stays blank."""
    import matplotlib.figure  # the extra `show`: of commands that a person runs

    figure = matplotlib.figure.Figure(figsize=(10, 2.2 * len(mels)), layout="constrained")
    low, high = min(map(np.nanmin, mels.values())), max(map(np.nanmax, mels.values()))
    strips = figure.subplots(len(mels), sharex=True, squeeze=False)[:, 0]
    for axes, (name, mel) in zip(strips, mels.items(), strict=True):
        extent = (0, len(mel) * seconds, 0, mel.shape[1])
        axes.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest")
        axes.set_ylabel(f"{name}\nmel filter")
    strips[-1].set_xlabel("seconds")
    figure.savefig(out, dpi=100)


_BLUE, _ORANGE = "#3b6ea5", "#d98032"

# A clip's name, its mel as recorded and as it came back.
Pair = tuple[str, Float[np.ndarray, "_ mels"], Float[np.ndarray, "_ mels"]]


def draw_tokenizer(
    pairs: Sequence[Pair], seconds: float, numbers: Mapping[str, float], sizes: Sequence[int], out: Path
) -> None:
    """Draws what a tokenizer does to clips, and how its levels are used.

    Args:
        pairs: clips with their mels before and after.
        seconds: of one frame.
        numbers: the scores `codes_used_qN` (a share), `perplexity_qN` (of codes), `mel_mae_qN` (with N + 1 levels) of
            every level, and `mel_mae_unquantized`.
        sizes: codes of each level's codebook.
        out: the file, of a format that matplotlib writes.
    """
    import matplotlib.figure

    # Two strips a clip on one color scale, what is lost shows as a difference; below them the levels of the quantizer.
    rows = 2 * len(pairs)
    figure = matplotlib.figure.Figure(figsize=(11, 1.6 * rows + 3.2), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[*[1.6] * rows, 3.2])
    for place, (name, *mels) in enumerate(pairs):
        low, high = min(mel.min() for mel in mels), max(mel.max() for mel in mels)
        for below, (mel, what) in enumerate(zip(mels, ("recorded", "from its codes"), strict=True)):
            axes = figure.add_subplot(grid[2 * place + below, :])
            extent = (0, len(mel) * seconds, 0, mel.shape[1])
            axes.imshow(
                mel.T, origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high, interpolation="nearest"
            )
            axes.set_xlim(0, max(map(len, mels)) * seconds)
            axes.set_ylabel("mel filter")
            axes.set_title(f"{name}, {what}", loc="left", fontsize=9)
            if below:
                axes.set_xlabel("seconds")
    # How many of each level's codes are used, and how evenly.
    levels = np.arange(len(sizes))
    axes = figure.add_subplot(grid[rows, 0])
    share = [100 * numbers[f"codes_used_q{q}"] for q in range(len(sizes))]
    even = [100 * numbers[f"perplexity_q{q}"] / sizes[q] for q in range(len(sizes))]
    axes.bar(levels - 0.2, share, 0.4, color=_BLUE, label="used at least once")
    axes.bar(levels + 0.2, even, 0.4, color=_ORANGE, label="perplexity")
    axes.set_xticks(levels, [f"{q + 1}\n{sizes[q]}" for q in range(len(sizes))])
    axes.set_xlabel("level, and its codes")
    axes.set_ylabel("% of the codes")
    axes.legend(fontsize=8)
    axes = figure.add_subplot(grid[rows, 1])
    # What every further level wins, beside the error without quantizing.
    errors = [numbers[f"mel_mae_q{q}"] for q in range(len(sizes))]
    axes.plot(levels + 1, errors, "o-", color=_BLUE, label="from codes")
    axes.axhline(numbers["mel_mae_unquantized"], color=_ORANGE, linestyle="--", label="not quantized")
    axes.set_xticks(levels + 1)
    axes.set_ylim(0, 1.2 * max(*errors, numbers["mel_mae_unquantized"]))
    axes.set_xlabel("levels kept")
    axes.set_ylabel("mel error (mean absolute)")
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=100)
