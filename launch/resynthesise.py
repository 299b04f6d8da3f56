"""Speech → codes → mel → 24 kHz waveform: hears a recording, keeps its codes alone, and speaks it again.

    python launch/resynthesise.py --checkpoint audio_encoder=DIR,audio_decoder=DIR,flow=DIR --audio in.wav --out out.wav
        [--picture mels.png] [--codes codes.npy]

DIR is a checkpoint or a workdir. Where the checkpoint of `flow` also has a vocoder (HiFT), that makes the waveform,
else Griffin-Lim; the last line says which. Recordings beyond 30 s go window by window.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import soundfile

from baichuan_omni_jax.checkpoint import find_checkpoint, load_branches, with_shardings
from baichuan_omni_jax.checkpoint.branches import branch_folder, parse_spec
from baichuan_omni_jax.config import ConfigError, MeshConfig, OmniConfig, read_hf
from baichuan_omni_jax.config.errors import exit_code
from baichuan_omni_jax.config.sound_targets import flow_target
from baichuan_omni_jax.convert.files import VOCODER_CONFIG
from baichuan_omni_jax.convert.tables import abstract_branches
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.omni.resynthesis import Resynthesised, Voice
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.config import VocoderConfig, read_vocoder_config
from data_pipelines.document import SampleError
from data_pipelines.features import clip_windows, log_mel
from data_pipelines.media import Media
from data_pipelines.mel_targets import mel_target
from data_pipelines.sounds import decode_sound, probe_sound

BRANCHES = ("audio_encoder", "audio_decoder", "flow")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with one sentence when something given cannot be used."""
    options = _parser().parse_args(arguments)
    return exit_code(lambda: resynthesise(options))


def resynthesise(options: argparse.Namespace) -> None:
    """Does what the options ask for. Raises ConfigError naming the file or the branch that cannot be used."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        voice, cfg = load_voice(options.checkpoint)
        pieces = [voice.speak(voice.encode(mel)) for mel in read_windows(options.audio, cfg)]
    wave, rate = np.concatenate([piece.wave for piece in pieces]), pieces[0].rate
    soundfile.write(options.out, wave, rate)
    codes = np.concatenate([piece.codes for piece in pieces])
    if options.codes:
        np.save(options.codes, codes)
    if options.picture:
        _draw(options, pieces, cfg)
    print(f"{options.out}: {len(wave) / rate:.1f} s at {rate} Hz from {len(codes)} code frames, by {voice.vocoder}")


def load_voice(spec: str) -> tuple[Voice, OmniConfig]:
    """The branches that `spec` names, and the vocoder beside `flow` where there is one."""
    sources = parse_spec(spec, BRANCHES)
    missing = [name for name in BRANCHES if name not in sources]
    if missing:
        raise ConfigError(f"--checkpoint {spec}: branch {missing[0]} is missing")
    home = find_checkpoint(sources["flow"])
    cfg, vocoder = read_hf(Path(home / "config.json")), _vocoder_config(home)
    mesh, compute = jax.sharding.get_mesh(), Compute()
    names = (*BRANCHES, "vocoder") if vocoder else BRANCHES
    abstract = abstract_branches(cfg, vocoder, only=names, compute=compute)
    spec = ",".join(f"{name}={sources[name]}" for name in BRANCHES) + (f",vocoder={home}" if vocoder else "")
    placed = {name: with_shardings(module, mesh, compute.rules, name=name) for name, module in abstract.items()}
    return Voice(load_branches(spec, placed), cfg), cfg


def _vocoder_config(home) -> VocoderConfig | None:
    sizes = home / VOCODER_CONFIG
    return read_vocoder_config(Path(sizes)) if (home / branch_folder("vocoder")).exists() and sizes.exists() else None


def read_windows(path: Path, cfg: OmniConfig) -> list[np.ndarray]:
    """Log mels (frames, mels) of a recording's windows. Raises ConfigError when it cannot be heard."""
    media, audio = Media(str(path), path), cfg.audio
    try:
        wave = decode_sound(media, probe_sound(media, audio.sampling_rate), audio.sampling_rate)
    except SampleError as error:
        raise ConfigError(f"--audio: {error}") from error
    windows = clip_windows(len(wave), audio)
    if not windows:
        raise ConfigError(f"--audio {path} is too short: {len(wave)} samples give no code frame")
    return [log_mel(wave[window.start : window.start + window.samples], audio).T for window in windows]


def _draw(options: argparse.Namespace, pieces: list[Resynthesised], cfg: OmniConfig) -> None:
    """The recording's 24 kHz mel above the one that was made."""
    from data_pipelines.mel_picture import draw_mels  # imports matplotlib

    settings, media = flow_target(cfg.flow), Media(str(options.audio), options.audio)
    wave = decode_sound(media, probe_sound(media, settings.rate), settings.rate)
    made = np.concatenate([piece.mel for piece in pieces])
    seconds = settings.hop / settings.rate
    draw_mels({"recorded": mel_target(wave, settings), "from its codes": made}, seconds, options.picture)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR|branch=DIR,...", required=True, help=f"where {', '.join(BRANCHES)} are")
    add("--audio", metavar="FILE", type=Path, required=True, help="the recording")
    add("--out", metavar="FILE.wav", type=Path, required=True, help="where the waveform goes")
    add("--picture", metavar="FILE.png", type=Path, help="both mels; needs matplotlib (the show extra)")
    add("--codes", metavar="FILE.npy", type=Path, help="the codes, int32 (frames, levels)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
