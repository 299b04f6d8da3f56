"""The small recipe from random weights: what each ability reaches beside chance and its target, what each stage costs.

    python benchmarks/small_recipe.py --workdir runs/small [--data DIR] [--minutes N] [--until STAGE] [--json]

Runs `baichuan-omni recipe small`, which goes on where it was stopped, and reads what it left. `--minutes N` shortens
every stage to about N minutes in all on two CPU cores: then targets are shown, and none of them is asked for. Where the
package pocketsphinx is installed it hears the spoken digits, and is compared with itself on the recordings.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rows import emit, row

from baichuan_omni_jax.cli.main import main as run_command
from baichuan_omni_jax.config import load_run_config
from baichuan_omni_jax.config.recipes import SMALL, Target
from baichuan_omni_jax.evaluation.chain_record import EVALUATION
from baichuan_omni_jax.evaluation.report_page import Report, collect, target_value
from baichuan_omni_jax.evaluation.samples import Sample
from data_pipelines.media.audio import read_audio
from data_pipelines.media.location import Media

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 16000
KEPT = 0.7  # of the digits that pocketsphinx hears in recordings, it is to hear in the model's speech


def share_of(minutes: float) -> float:
    """Returns which share of every stage's steps takes so long, by what steps are expected to take."""
    seconds = sum(load_run_config(stage.name).train.steps * stage.step_seconds for stage in SMALL.stages)
    return min(1.0, 60 * minutes / seconds)


def ability_rows(report: Report, asked: bool) -> list[dict]:
    """One row a target, and one for each ability without any; `asked`: whether targets count."""
    rows = []
    for ability, score in report.final.items():
        note = f"chance {score.chance:.3f}" if score.chance is not None else ""
        note += f", {score.items:.0f} items" if score.items else ""
        targets: Sequence[Target] = report.targets.get(ability, ())
        if not any(target.measure == score.measure for target in targets):
            rows.append(row(f"{ability} {score.measure}", score.score, "", note=note))
        for target in targets:
            value = target_value(report, ability, target)
            if value is None:
                continue
            goal = f"{'>=' if target.measure in ('accuracy', 'media_gain') else '<='} {target.bound:g}"
            unit = "nats" if target.measure == "media_gain" else ""
            met = target.is_met(value)
            rows.append(
                row(
                    f"{ability} {target.measure}",
                    value,
                    unit,
                    goal=goal,
                    ok=met if asked else None,
                    note=f"{note}; {'met' if met else 'missed'}",
                )
            )
    missing = [ability for ability in report.targets if ability not in report.final]
    return rows + [row(f"{name} not measured", 0, "", goal="measured", ok=False if asked else None) for name in missing]


def stage_rows(report: Report) -> list[dict]:
    """Wall and CPU seconds of every stage, and of all."""
    rows = []
    for stage in report.stages:
        note = f"{stage.record.cpu:.0f} CPU seconds" + (f", {stage.step} steps" if stage.records else "")
        rows.append(row(f"{stage.title} wall", stage.record.wall, "s", note=note))
    total = sum(stage.record.wall for stage in report.stages)
    cpu = sum(stage.record.cpu for stage in report.stages)
    return [*rows, row("all stages wall", total, "s", note=f"{cpu:.0f} CPU seconds")]


def sphinx_rows(samples: Sequence[Sample], asked: bool) -> list[dict]:
    """The share of spoken digits that pocketsphinx hears, of the model's speech and of the recordings of the same."""
    spoken = [sample for sample in samples if sample.ability == "speak_numbers" and sample.speech and sample.recording]
    if not spoken:
        return []
    try:
        import pocketsphinx
    except ImportError:
        return [row("digits heard by pocketsphinx", 0, "", note="pocketsphinx is not installed")]
    with tempfile.TemporaryDirectory() as folder:
        grammar = Path(folder) / "digits.gram"
        grammar.write_text(f"#JSGF V1.0;\ngrammar digits;\npublic <digits> = ({' | '.join(DIGITS)})+;\n")
        decoder = pocketsphinx.Decoder(jsgf=str(grammar), samprate=RATE, loglevel="FATAL")
        own = digits_heard(decoder, [(sample.speech, sample.reference) for sample in spoken])
        true = digits_heard(decoder, [(sample.recording, sample.reference) for sample in spoken])
    ratio = own / true if true else 0.0
    return [
        row(
            "digits heard by pocketsphinx",
            own,
            "",
            peer="the recordings",
            peer_value=true,
            ratio=ratio,
            goal=f"ratio >= {KEPT}",
            ok=ratio >= KEPT if asked else None,
            note=f"{len(spoken)} clips, one voice",
        )
    ]


def digits_heard(decoder, clips: Sequence[tuple[str, str]]) -> float:
    """1 - edits over digits, of what the decoder hears in (file, text)."""
    edits = total = 0
    for path, text in clips:
        wave = read_audio(Media(path, Path(path)), RATE).wave
        decoder.start_utt()
        decoder.process_raw((np.clip(wave, -1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        heard = decoder.hyp().hypstr.split() if decoder.hyp() else []
        said = digit_words(text)
        edits, total = edits + distance(heard, said), total + len(said)
    return max(0.0, 1 - edits / total) if total else 0.0


def digit_words(text: str) -> list[str]:
    """The digits of a text as words, however they are written.

    >>> digit_words("Say 4 2 and nine.")
    ['four', 'two', 'nine']
    """
    words = [word.strip(".,:;?!").lower() for word in text.split()]
    named = [DIGITS[int(word)] if len(word) == 1 and word.isdigit() else word for word in words]
    return [word for word in named if word in DIGITS]


def distance(heard: Sequence[str], said: Sequence[str]) -> int:
    """Edits between two lists of words."""
    before = list(range(len(said) + 1))
    for n, word in enumerate(heard, 1):
        now = [n]
        for m, right in enumerate(said, 1):
            now.append(min(before[m] + 1, now[-1] + 1, before[m - 1] + (word != right)))
        before = now
    return before[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/small"), help="where the recipe goes (%(default)s)")
    add("--data", type=Path, help="the data set, made where it is not there")
    add("--minutes", type=float, help="about how long all stages may take; without it, all of their steps")
    add("--until", metavar="STAGE", help="the last stage to train: then no target is asked for")
    add("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    share = 1.0 if options.minutes is None else share_of(options.minutes)
    command = ["recipe", "small", "--workdir", str(options.workdir), "--share", f"{share:.4f}"]
    for flag in ("data", "until"):
        if value := getattr(options, flag):
            command += [f"--{flag}", str(value)]
    if code := run_command(command):
        return code
    report, asked = collect(options.workdir), share == 1.0 and not options.until
    rows = ability_rows(report, asked) + sphinx_rows(report.samples, asked) + stage_rows(report)
    if not (options.workdir / EVALUATION).is_dir():
        rows.append(row("evaluation", 0, "", note="nothing was asked: the last stage has no eval.abilities"))
    return emit(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
