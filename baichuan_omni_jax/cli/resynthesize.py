"""Speech → codes → mel → 24 kHz waveform: hears a recording, keeps its codes alone, and speaks it again.

    baichuan-omni resynthesize --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --audio in.wav --out out.wav
        [--picture mels.png] [--codes codes.npy]

DIR is a checkpoint or a workdir. Where the checkpoint of `flow` also has a vocoder (HiFT), that makes the waveform,
else Griffin-Lim; the last line says which. Recordings beyond 30 s go window by window.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import soundfile

from baichuan_omni_jax.audio.tokenize import WindowEncoder
from baichuan_omni_jax.branches import SPEECH_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint.branches import parse_spec
from baichuan_omni_jax.cli.common import check_folders
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.crossfade import CrossFade
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.generation.speech_decoder import DecodedSpeech, SpeechDecoder
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.features import Window, clip_windows, log_mel, mel_target
from data_pipelines.media.location import Media


def run(options: argparse.Namespace) -> None:
    """Does what the options ask for. Raises ConfigError naming the file or the branch that cannot be used."""
    check_options(options)
    sources = parse_spec(options.checkpoint, (*SPEECH_BRANCHES, VOCODER_BRANCH))
    loaded = load_for_generation(
        ",".join(f"{name}={folder}" for name, folder in sources.items()), needed=SPEECH_BRANCHES
    )
    cfg, speaker = loaded.config, SpeechDecoder(loaded.branches, loaded.config)
    windows, mels = read_windows(options.audio, cfg)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        hear = WindowEncoder(loaded.branches["audio_encoder"], mesh, windows_per_device=1)
        by_window = dict(hear((i, mel.T) for i, mel in enumerate(mels)))
    heard = [by_window[i] for i in range(len(mels))]
    pieces = [speaker.speak(codes) for codes in heard]
    fade = CrossFade(speaker.fade)
    wave = np.concatenate([*(fade.push(piece.wave) for piece in pieces), fade.close()])
    soundfile.write(options.out, wave, speaker.rate)
    codes = np.concatenate(heard)
    if options.codes:
        np.save(options.codes, codes)
    if options.picture:
        _draw(options, pieces, windows, cfg)
    if loaded.untrained:
        print(f"untrained: {', '.join(loaded.untrained)}")
    seconds = len(wave) / speaker.rate
    print(f"{options.out}: {seconds:.1f} s at {speaker.rate} Hz from {len(codes)} code frames, by {speaker.vocoder}")


def read_windows(path: Path, cfg: OmniConfig) -> tuple[list[Window], list[np.ndarray]]:
    """A recording's windows and their log mels (frames, mels). Raises ConfigError when it cannot be heard."""
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
    check_folders(options, "out", "picture", "codes")
    if options.out.suffix.lower() != ".wav":
        raise ConfigError(f"--out {options.out}: waveforms are written as .wav")
    if options.picture and find_spec("matplotlib") is None:
        raise ConfigError("--picture needs matplotlib: pip install '.[show]'")


def _draw(options: argparse.Namespace, pieces: list[DecodedSpeech], windows: list[Window], cfg: OmniConfig) -> None:
    """The recording's 24 kHz mel above the one that was made, each window of which stands where it was heard."""
    from data_pipelines.tools.figures import draw_mels  # imports matplotlib

    settings, media = flow_target(cfg.flow), Media(str(options.audio), options.audio)
    wave = decode_audio(media, probe_audio(media, settings.rate), settings.rate)
    recorded, seconds = mel_target(wave, settings), settings.hop / settings.rate
    starts = [round(window.start / cfg.audio.sampling_rate / seconds) for window in windows]
    made = mels_in_place([piece.mel for piece in pieces], starts, recorded)
    draw_mels({"recorded": recorded, "from its codes": made}, seconds, options.picture)


def mels_in_place(mels: list[np.ndarray], starts: list[int], like: np.ndarray) -> np.ndarray:
    """Windows' mels as one as long as `like`, each from its own start; NaN where no code is."""
    whole = np.full_like(like, np.nan)
    for mel, start in zip(mels, starts, strict=True):
        place = whole[start : start + len(mel)]
        place[:] = mel[: len(place)]
    return whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(SPEECH_BRANCHES)} are")
    add("--audio", metavar="FILE", type=Path, required=True, help="the recording")
    add("--out", metavar="FILE.wav", type=Path, required=True, help="where the waveform goes")
    add("--picture", metavar="FILE.png", type=Path, help="both mels; needs matplotlib (the show extra)")
    add("--codes", metavar="FILE.npy", type=Path, help="the codes, int32 (frames, levels)")
