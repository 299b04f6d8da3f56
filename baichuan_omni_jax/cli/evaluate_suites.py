"""Puts public benchmarks to a checkpoint: raw answers, verdicts, scores beside the report's.

    baichuan-omni evaluate --checkpoint DIR --suite omnibench --data data/OmniBench
    baichuan-omni evaluate --checkpoint DIR --suite openaudiobench --judge https://judge.example/v1 --judge-model NAME
    baichuan-omni evaluate --checkpoint DIR --suite mmlu,cmmlu,ceval,agieval
    baichuan-omni evaluate tokenizer --checkpoint DIR --manifest asr.jsonl

Answers are greedy and lie in OUT/SUITE/answers.jsonl, a line an item; started again, the same command goes on. Items
that cannot be asked are lines with their cause and are asked again. docs/how-to/evaluate.md says how data lie on disk.
Exit code 1: verdicts are missing that the same command would ask for again; 2: something given cannot be used; 3: the
disk is full, or no longer to be written.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import soundfile

from baichuan_omni_jax.checkpoint import find_checkpoint
from baichuan_omni_jax.cli.chat import (
    OpenedChat,
    add_model_arguments,
    add_sampling_arguments,
    generation_config,
    open_chat,
    print_note,
)
from baichuan_omni_jax.cli.common import quiet_logs
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.evaluation.suites.answers import AnswerFile, Likelihoods, engine_likelihoods, select_items
from baichuan_omni_jax.evaluation.suites.items import Item
from baichuan_omni_jax.evaluation.suites.judge_server import JudgeServer, find_model
from baichuan_omni_jax.evaluation.suites.judges import RUBRICS, CachedJudge, Rubric, read_rubrics
from baichuan_omni_jax.evaluation.suites.report import Judging, Rule, SuiteScores, score_suite, table_of, write_scores
from baichuan_omni_jax.evaluation.suites.speech import Recognizer, find_clips, measure_answers, recognize_answers
from baichuan_omni_jax.evaluation.suites.table import SUITES, Suite, find_suite
from baichuan_omni_jax.storage.given import given_folder, given_input
from data_pipelines.tools.commands import load_function

SPEECH = ("audio_head", "audio_encoder", "audio_decoder", "flow")


def add_suite_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of an evaluation by suites."""
    add_model_arguments(parser, data_flag="--data-parallel", required=False)
    add = parser.add_argument_group("the suites").add_argument
    add("--suite", metavar="NAME,...", help=f"of {', '.join(SUITES)}")
    add(
        "--data",
        dest="folder",
        type=given_input,
        metavar="DIR",
        help="the suite's files (default: data/ and its own folder)",
    )
    add(
        "--out",
        type=given_folder,
        default=Path("runs/evaluation"),
        metavar="DIR",
        help="a folder a suite (%(default)s)",
    )
    add("--group", action="append", default=[], metavar="NAME", help="a subset, subject or component; may be repeated")
    add("--limit", type=int, metavar="N", help="items of each group at most")
    add("--speech", action="store_true", help="spoken answers, judged by what --asr hears in them")
    add("--asr", metavar="MODULE:FUNCTION", help="your recognizer of spoken answers, f(samples, rate) -> text")
    add("--mos", metavar="MODULE:FUNCTION", help="a measure of spoken answers, as UTMOS, f(samples, rate) -> number")
    add("--voice-clips", type=given_input, metavar="DIR", help="clips of the voice that answers are compared with")
    add("--score-only", action="store_true", help="score the answers that are there, without a model")
    add = parser.add_argument_group("the judge of free answers").add_argument
    add(
        "--judge",
        default="rules",
        metavar="URL|rules|exact|none",
        help="OpenAI-compatible, up to /v1 (default %(default)s)",
    )
    add("--judge-model", metavar="NAME", help="its name there (default: the only one)")
    add("--judge-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="holds the key (default %(default)s)")
    add("--judge-timeout", type=float, default=60.0, metavar="SECONDS", help="of one reply (default %(default)s)")
    add("--rubrics", type=given_input, metavar="FILE.json", help="your own rubrics, subset -> text")
    add_sampling_arguments(parser.add_argument_group("the answers"))
    parser.set_defaults(system=None)


@dataclass(frozen=True)
class _Plan:
    """One suite that is to be run: its items, and where its answers go."""

    name: str
    suite: Suite
    items: list[tuple[int, Item]]
    answers: AnswerFile


def run_suites(options: argparse.Namespace) -> int:
    """Runs the suites and prints a table of each; returns the exit code. Raises ConfigError naming what cannot be
    used, before the first item is asked.
    """
    quiet_logs()
    # All that can be refused without the weights comes first: loading and compiling take minutes.
    plans = [_plan(options, name) for name in _suite_names(options)]
    judge, tools = _judge(options), _tools(options)
    opened = None if options.score_only else _open(options, [plan.suite for plan in plans])
    incomplete = False
    for plan in plans:
        try:
            if opened is not None:
                likelihoods = _likelihoods(opened) if plan.suite.task == "choose" else None
                at_once = 2 * options.slots
                plan.answers.fill(plan.items, opened.chat, likelihoods, at_once=at_once, report=print_note)
            scores = _score(options, plan, judge, tools)
            write_scores(plan.answers.path.with_name("scores.json"), scores)
        except KeyboardInterrupt:
            sentence = f"stopped: {plan.answers.path} keeps what is answered, the same command goes on"
            raise KeyboardInterrupt(sentence) from None
        # A full disk, a folder that became read-only: libsndfile has an error of its own for it.
        except (OSError, soundfile.SoundFileError) as error:
            sentence = f"{plan.answers.path.parent}: {error}; what is answered is kept, the same command goes on"
            raise RunStoppedError(sentence) from error
        print(table_of(scores), flush=True)
        incomplete |= scores.incomplete
    return int(incomplete)


def _suite_names(options: argparse.Namespace) -> list[str]:
    for flag in ("suite", "checkpoint"):
        if not getattr(options, flag) and not (flag == "checkpoint" and options.score_only):
            raise ConfigError(f"--{flag} must be given (see --help)")
    # Each once, however often it is named.
    names = list(dict.fromkeys(options.suite.split(",")))
    for name in names:
        find_suite(name)
    if options.folder and len({SUITES[name].folder for name in names}) > 1:
        raise ConfigError("--data names the files of one suite: give the others their own command, or folders in data/")
    for name in names:
        if SUITES[name].task == "speak" and not options.asr:
            raise ConfigError(f"--suite {name} is scored by what a recognizer hears: name yours by --asr")
    if options.voice_clips:
        find_clips(options.voice_clips)
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {options.limit}")
    return names


def _plan(options: argparse.Namespace, name: str) -> _Plan:
    suite = SUITES[name]
    items = select_items(suite.read(options.folder or Path("data") / suite.folder), options.group, options.limit)
    # Greedy unless `--set` says otherwise: a sampled score is one draw of many.
    speech = options.speech and suite.task == "chat"
    settings = generation_config(options, GenerationConfig(speech=speech, max_tokens=suite.max_tokens).greedy())
    folder = options.out / (f"{name}-spoken" if speech else name)
    return _Plan(name, suite, items, AnswerFile(folder / "answers.jsonl", suite, _checkpoint_name(options), settings))


def _checkpoint_name(options: argparse.Namespace) -> str:
    """What lines of answers call the checkpoint: of a workdir its newest step, another one after more training."""
    spec = options.checkpoint or ""
    return spec if options.score_only or "=" in spec else str(find_checkpoint(spec))


@dataclass(frozen=True)
class _Tools:
    """What the user brings to score answers with."""

    recognizer: Recognizer | None
    mos: Callable[..., float] | None
    rubrics: Mapping[str, Rubric]


def _tools(options: argparse.Namespace) -> _Tools:
    """Loads them. Raises ConfigError naming the flag."""
    return _Tools(
        recognizer=load_function("--asr", options.asr) if options.asr else None,
        mos=load_function("--mos", options.mos) if options.mos else None,
        rubrics=read_rubrics(options.rubrics) if options.rubrics else RUBRICS,
    )


def _judge(options: argparse.Namespace) -> JudgeServer | Rule:
    """The judge that the flags name. Raises ConfigError where it cannot be used."""
    if options.judge in get_args(Rule):
        if options.rubrics:
            raise ConfigError("--rubrics are for a judge: name its URL by --judge")
        return options.judge
    if not options.judge.startswith(("http://", "https://")):
        raise ConfigError(f"--judge {options.judge} is no URL, and none of rules, exact, none")
    server = JudgeServer(url=options.judge, model="", key=options.judge_key, timeout=options.judge_timeout)
    server.check()
    return replace(server, model=options.judge_model or find_model(server))


def _open(options: argparse.Namespace, suites: Sequence[Suite]) -> OpenedChat:
    speaks = options.speech or any(suite.task == "speak" for suite in suites)
    opened = open_chat(options, GenerationConfig().greedy(), speaks=speaks)
    if opened.notice:
        print_note(opened.notice)
    if opened.chat.processor is None:
        raise ConfigError(f"--checkpoint {options.checkpoint} brings no text tokenizer: name one by --tokenizer")
    # Before the first item: each of them would be refused for the same reason.
    for suite in suites:
        needed = {*suite.branches, *(SPEECH if options.speech and suite.task == "chat" else ())}
        if missing := sorted(needed - opened.branches):
            raise ConfigError(
                f"--checkpoint {options.checkpoint} has no branch {missing[0]}, which {suite.title} needs"
            )
    return opened


def _likelihoods(opened: OpenedChat) -> Likelihoods:
    processor = opened.chat.processor
    assert processor is not None
    return engine_likelihoods(opened.engine, processor)


def _score(options: argparse.Namespace, plan: _Plan, judge: JudgeServer | Rule, tools: _Tools) -> SuiteScores:
    if not plan.answers.path.exists():
        raise ConfigError(f"{plan.answers.path} holds no answer to score")
    # Verdicts, too, are one program's at a time.
    with plan.answers.locked():
        return _scored(options, plan, judge, tools)


def _scored(options: argparse.Namespace, plan: _Plan, judge: JudgeServer | Rule, tools: _Tools) -> SuiteScores:
    folder = plan.answers.path.parent
    lines = plan.answers.lines(plan.items)
    if not lines:
        raise ConfigError(f"{plan.answers.path} holds no answer to score")
    # Spoken answers are judged by what a listener would hear; without a recognizer by what they wrote.
    spoken = any("audio" in line for line in lines)
    heard, notes = None, []
    if tools.recognizer is not None and (spoken or plan.suite.task == "speak"):
        heard, notes = recognize_answers(folder, lines, tools.recognizer, options.asr)
    elif spoken:
        notes = ["judged by what the answers wrote, not by what is heard in them: no --asr"]
    judging = Judging(
        judge=CachedJudge(judge, folder / "verdicts.jsonl") if isinstance(judge, JudgeServer) else judge,
        rubrics=tools.rubrics,
        heard=heard,
    )
    scores = score_suite(plan.name, plan.suite, plan.items, lines, judging, print_note)
    if spoken:
        # Text that was read aloud is measured against by the suite's own score.
        against = heard if plan.suite.task == "chat" else None
        measures, left_out = measure_answers(folder, plan.items, lines, against, options.voice_clips, tools.mos)
        scores = replace(scores, measures=measures, notes=[*scores.notes, *left_out])
    return replace(scores, notes=[*scores.notes, *notes])
