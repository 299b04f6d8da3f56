"""Turns a recording into codes, and the codes alone back: codes → mel → 24 kHz waveform.

    baichuan-omni resynthesize --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --audio in.wav --out out.wav
        [--plot mels.png] [--codes codes.npy]

DIR is a checkpoint or a workdir. Where the checkpoint of `flow` also has a vocoder (HiFT), that makes the waveform,
else Griffin-Lim; the last line says which. Recordings beyond 30 s go window by window.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import jax
import numpy as np
import soundfile

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.tokenize import WindowEncoder
from baichuan_omni_jax.branches import SPEECH_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint.branches import parse_spec
from baichuan_omni_jax.cli.common import check_folders
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.generation.speech_decoder import CrossFade, DecodedSpeech, SpeechDecoder
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.features import Window, clip_windows, log_mel, mel_target
from data_pipelines.media.location import Media


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `resynthesize`."""
    add = parser.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--audio", metavar="FILE", type=Path, required=True, help="the recording")
    add("--out", metavar="FILE.wav", type=Path, required=True, help="where the waveform goes")
    add("--plot", "--picture", metavar="FILE.png", type=Path, help="both mels (extra `show`)")
    add("--codes", metavar="FILE.npy", type=Path, help="the codes, int32 (frames, levels)")


def run(options: argparse.Namespace) -> None:
    """Writes the waveform that comes back. Raises ConfigError naming the file or the branch that cannot be used."""
    check_options(options)
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


def check_options(options: argparse.Namespace) -> None:
    """Before minutes of work: raises ConfigError for files that could not be written."""
    check_folders(options, "out", "plot", "codes")
    if options.out.suffix.lower() != ".wav":
        raise ConfigError(f"--out {options.out}: waveforms are written as .wav")
    if options.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install '.[show]'")


def _plot(options: argparse.Namespace, pieces: list[DecodedSpeech], windows: list[Window], cfg: OmniConfig) -> None:
    """The recording's 24 kHz mel above the one that was made, each window of which stands where it was."""
    from data_pipelines.tools.figures import draw_mels  # imports matplotlib

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
