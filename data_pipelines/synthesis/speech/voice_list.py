"""`python -m data_pipelines.synthesis voices`: the voices of a back end by name, and a picture of ten of them."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from PIL import Image

from baichuan_omni_jax.audio.config import AudioConfig
from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import file_errors
from data_pipelines.media.features import log_mel
from data_pipelines.synthesis.speech.espeak import LANGUAGES
from data_pipelines.synthesis.speech.speaking import INCLUDED, TextToSpeech, load_speech, voice_text

SENTENCES = {"en": "The lake is calm tonight, isn't it?", "zh": "今晚的湖水很平静，对吗？"}
_READ = {"en": SENTENCES["en"], "zh": "Jīnwǎn de húshuǐ hěn píngjìng, duì ma?"}  # few machines have a Chinese font
SHOWN = 5  # voices of each language in the picture
COLOURS = 96  # of a PNG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--tts", default="espeak", help=f"{', '.join(INCLUDED)} or package.module:factory")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draws ten of them: .png, .pdf or .svg")


def list_voices(options: argparse.Namespace) -> None:
    """Prints each language's voices, and draws the picture that is asked for. Raises ConfigError."""
    speech = load_speech(options.tts)
    for language in LANGUAGES:
        names = speech.voices(language)
        print(f"{language}: {len(names)} voices")
        for name in names:
            print(f"  {name}")
    if options.picture:
        draw_voices(speech, options.picture)
        print(f"{options.picture}: {len(_shown(speech))} voices")


def draw_voices(speech: TextToSpeech, path: Path) -> None:
    """Writes the log mels of one sentence a language, each by voices spread over the list, all on one time scale.

    Raises ConfigError when matplotlib is missing or cannot write such a file there.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib: pip install baichuan_omni_jax[show]") from error
    figure = figures.Figure(dpi=80, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds or not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: a folder that exists, and one of {', '.join(sorted(kinds))}")
    audio = resolve_model("baichuan_omni_7b").audio
    shown = _shown(speech)
    mels = [_mel(speech, voice, language, audio) for language, voice in shown]
    seconds = max(mel.shape[1] for mel in mels) * audio.hop_length / audio.sampling_rate
    rows = -(-len(shown) // 2)
    figure.set_size_inches(10, 0.6 + 1.3 * rows)
    spots = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    for place, ((language, voice), mel) in enumerate(zip(shown, mels, strict=True)):
        axes = spots[place % rows, place // rows]
        extent = (0, mel.shape[1] * audio.hop_length / audio.sampling_rate, 0, len(mel))
        axes.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma", interpolation="nearest")
        heading = f"“{_READ[language]}”\n" if place % rows == 0 else ""
        axes.set_title(heading + voice, fontsize=10, loc="left", pad=3)
        axes.set(xlim=(0, seconds), yticks=[0, 64, 128], ylabel="mel bin" if place < rows else "")
        if place % rows == rows - 1:
            axes.set_xlabel("seconds")
    with file_errors(path):
        figure.savefig(path)
    if path.suffix == ".png":
        with Image.open(path) as picture:  # a third of the size, and hardly another picture
            palette = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)


def _shown(speech: TextToSpeech) -> list[tuple[str, str]]:
    """(language, voice) of `SHOWN` voices of each language, from the whole length of its list."""
    pairs: list[tuple[str, str]] = []
    for language in LANGUAGES:
        names: Sequence[str] = speech.voices(language)
        places = np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int).tolist()
        pairs += [(language, names[place]) for place in places]
    return pairs


def _mel(speech: TextToSpeech, voice: str, language: str, audio: AudioConfig) -> np.ndarray:
    samples, rate = voice_text(speech, SENTENCES[language], voice, language)
    wave = soxr.resample(samples.astype(np.float32) / 32768, rate, audio.sampling_rate)
    return log_mel(wave.astype(np.float32), audio)
