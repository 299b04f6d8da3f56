"""Makes new documents from those of manifests: speech, pages, charts, captions; and filters them.

`voices` in place of a job lists the voices that speak. A job that was stopped goes on where it was when the same
command is given again.
"""

import argparse
import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from PIL import Image

from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.config.architecture import AudioConfig
from baichuan_omni_jax.errors import ConfigError, exit_code
from data_pipelines.datasets.builder.build import UNPACKED
from data_pipelines.datasets.jobs.job import folder_lock, refuse_foreign, run_job
from data_pipelines.errors import describe_causes, file_errors, first_of_causes
from data_pipelines.media.features import log_mel
from data_pipelines.synthesis.captions import CAPTIONS
from data_pipelines.synthesis.filters.job import FILTERS
from data_pipelines.synthesis.pages.job import PAGES
from data_pipelines.synthesis.speech.crossmodal import CROSSMODAL
from data_pipelines.synthesis.speech.espeak import LANGUAGES
from data_pipelines.synthesis.speech.speaking import INCLUDED, TextToSpeech, load_speech, voice_text
from data_pipelines.synthesis.speech.tasks import ASR, DIALOGUE, INTLV, ITTS, TTS
from data_pipelines.synthesis.units import SynthesisTask, add_job_arguments
from data_pipelines.tools.commands import (
    add_runner_arguments,
    run_command,
    run_job_command,
    runner_from_options,
    skipped_lines,
)

LOCK = "synthesis"
TASKS = (INTLV, ITTS, ASR, TTS, DIALOGUE, CROSSMODAL, PAGES, CAPTIONS, FILTERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for each task, and `voices`."""
    jobs = parser.add_subparsers(metavar="JOB", required=True)
    for task in TASKS:
        own = jobs.add_parser(task.name, help=task.description, description=task.description)
        add_job_arguments(own)
        add_runner_arguments(own)
        task.add_arguments(own)
        own.set_defaults(task=task)
    lists = "Lists the voices of a back end by name, and draws ten of them."
    voices = jobs.add_parser("voices", help=lists, description=lists)
    voices.add_argument("--tts", default="espeak", help=f"{', '.join(INCLUDED)} or package.module:factory")
    voices.add_argument("--picture", metavar="FILE", type=Path, help="draws ten of them: .png, .pdf or .svg")
    voices.set_defaults(task=None)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    if arguments.task is None:
        return exit_code(lambda: list_voices(arguments))
    return run_job_command(lambda: _synthesize(arguments, arguments.task), arguments.out)


def _synthesize(options: argparse.Namespace, task: SynthesisTask) -> None:
    """Runs one task's job, puts the manifests together and prints what was made and what was not."""
    # One task at a time in a folder: its manifests and media would be another's too.
    refuse_foreign(options.out, LOCK)
    job, runner = task.make_job(options), runner_from_options(options)
    with folder_lock(options.out, LOCK, job.title):
        sums = task.finish(job, run_job(job, runner))
    for part, count in sorted(sums["made"].items()):
        print(f"{options.out / part}.jsonl: {count} documents")
    # What was not made is named by cause, with the first document of each.
    for key, name in (("rejected", "rejected"), ("skipped", f"skipped-{job.title}")):
        if counts := sums.get(key):
            path = options.out / f"{name}.jsonl"
            print(f"{path}: {counts.total()} {key}:")
            examples = first_of_causes(skipped_lines(path), counts) if key == "skipped" else {}
            for line in describe_causes(counts, examples):
                print(f"  {line}")
    # What compressed manifests hold was only needed while the units read it.
    shutil.rmtree(options.out / UNPACKED, ignore_errors=True)
    if not (sums["made"] or sums.get("rejected")):
        raise ConfigError(f"nothing can be made of {', '.join(map(str, options.manifests))}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("synthesize", __doc__, add_arguments, run, arguments)


SENTENCES = {"en": "The lake is calm tonight, isn't it?", "zh": "今晚的湖水很平静，对吗？"}
_READ = {"en": SENTENCES["en"], "zh": "Jīnwǎn de húshuǐ hěn píngjìng, duì ma?"}  # few machines have a Chinese font
SHOWN = 5  # voices of each language in the figure
COLORS = 96  # of a PNG


def list_voices(options: argparse.Namespace) -> None:
    """Prints each language's voices, and draws the figure where `--picture` names one. Raises ConfigError."""
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
    # Refused before anything is spoken, which takes seconds.
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds or not path.parent.is_dir():
        raise ConfigError(f"--picture {path}: a folder that exists, and one of {', '.join(sorted(kinds))}")
    # Mels as the released model takes them, all on one time scale.
    audio = resolve_model("baichuan_omni_7b").audio
    # English voices on the left, Chinese on the right, over the length of the list.
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
        # A palette: a third of the size, and to the eye the same.
        with Image.open(path) as image:
            palette = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)


def _shown(speech: TextToSpeech) -> list[tuple[str, str]]:
    """Returns (language, voice) of `SHOWN` voices of each language, from the whole length of its list."""
    pairs: list[tuple[str, str]] = []
    for language in LANGUAGES:
        names: Sequence[str] = speech.voices(language)
        places: list[int] = np.linspace(0, len(names) - 1, min(SHOWN, len(names))).round().astype(int).tolist()
        pairs += [(language, names[place]) for place in places]
    return pairs


def _mel(speech: TextToSpeech, voice: str, language: str, audio: AudioConfig) -> np.ndarray:
    samples, rate = voice_text(speech, SENTENCES[language], voice, language)
    wave = soxr.resample(samples.astype(np.float32) / 32768, rate, audio.sampling_rate)
    return log_mel(wave.astype(np.float32), audio)


if __name__ == "__main__":
    sys.exit(main())
