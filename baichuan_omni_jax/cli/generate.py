"""Asks a checkpoint: chat, speech recognition, reading aloud, descriptions.

    baichuan-omni generate chat --checkpoint runs/tiny --prompt "What is a star?"
    baichuan-omni generate chat --checkpoint DIR --image cat.jpg --prompt "What is this?" --out answer.wav
    baichuan-omni generate chat --checkpoint DIR --interactive
    baichuan-omni generate asr --checkpoint llm=A,audio_head=A,audio_encoder=B --audio speech.wav
    baichuan-omni generate tts --checkpoint DIR --prompt "Good morning." --out morning.wav
    baichuan-omni generate chat --checkpoint DIR --manifest questions.jsonl --output answers.jsonl

The answer goes to standard output as it is made, everything else to standard error. `--out` answers aloud too. A
manifest's lines have the fields that the flags have (`prompt`, `system`, `image`, `audio`, `video`, or `messages`, or
`tokens`); media stand before the text, in the order in which they are given. Started again, the same command goes on
after the last line that it answered. docs/how-to/generate.md says more.
Exit code 2: something given cannot be used, the message says what. 130: Ctrl-C, but for answers that it ends early.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import soundfile

from baichuan_omni_jax.cli.common import check_folders, start_logging
from baichuan_omni_jax.cli.generation.asking import TASKS, ask, default_settings
from baichuan_omni_jax.cli.generation.opening import Opened, add_model_flags, open_chat, say
from baichuan_omni_jax.cli.generation.report import as_record, describe, show
from baichuan_omni_jax.cli.generation.settings import add_settings_flags, settings_of
from baichuan_omni_jax.cli.generation.talking import talk
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.batch_requests import Question, answer_questions, read_questions
from baichuan_omni_jax.generation.chat import ChatAnswer, ChatStream
from data_pipelines.documents.manifest import open_manifest
from data_pipelines.documents.token_ids import read_id_file


def run(options: argparse.Namespace) -> None:
    """Answers what the flags ask. Raises ConfigError, also where the one request cannot be served."""
    start_logging()
    check_flags(options)
    try:
        generate(options)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def generate(options: argparse.Namespace) -> None:
    """Does what the options ask for. Raises ConfigError and RequestError."""
    values = _values(options)
    questions = read_questions(options.manifest, _manifest_bytes) if options.manifest else []
    opened = open_chat(options, _settings(options))
    if opened.notice:
        say(opened.notice)
    if options.manifest:
        _answer_manifest(options, opened, questions)
    elif options.interactive:
        talk(opened.chat, values, options.out)
    else:
        answer = show(ask(opened.chat, options.task, values))
        _keep(options, answer)
        say(describe(answer, opened.chat.model))


def _manifest_bytes(path: Path) -> bytes:
    """What a manifest holds, plain or compressed."""
    with open_manifest(path, str(path)) as file:
        return file.read()


def _keep(options: argparse.Namespace, answer: ChatAnswer) -> None:
    if options.save:
        options.save.write_text(json.dumps(as_record(answer), ensure_ascii=False) + "\n", encoding="utf-8")
    if options.out and not len(answer.samples):
        say(f"no speech was made, so {options.out} was not written")
    elif options.out:
        soundfile.write(options.out, answer.samples, answer.rate)
        say(f"{options.out}: {answer.audio_seconds:.1f} s at {answer.rate} Hz")


def _answer_manifest(options: argparse.Namespace, opened: Opened, questions: list[Question]) -> None:
    chat, folder = opened.chat, options.output.with_name(f"{options.output.stem}_audio")
    base = options.manifest.parent

    def record(question: Question, answer: ChatAnswer) -> dict[str, Any]:
        fields = as_record(answer)
        if len(answer.samples):
            folder.mkdir(exist_ok=True)
            path = folder / f"{question.line:06d}.wav"
            soundfile.write(path, answer.samples, answer.rate)
            fields["audio"] = str(path)
        return fields

    def put(question: Question) -> ChatStream:
        return ask(chat, options.task, question.values, jax.random.fold_in(chat.key, question.line), base)

    try:
        outcomes = answer_questions(questions, options.output, put, record, at_once=2 * options.slots, report=say)
    except KeyboardInterrupt:
        sentence = f"stopped: {options.output} keeps what is answered, the same command goes on"
        raise KeyboardInterrupt(sentence) from None
    metrics = chat.model.engine.metrics
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common()) or "nothing asked"
    say(f"{options.output}: {counts}; {metrics.tokens_per_s:.1f} tokens/s, {metrics.compiles} programs compiled")


def _settings(options: argparse.Namespace) -> GenerationConfig:
    aloud = options.task != "tts" and bool(options.speech or options.out)
    return settings_of(options, default_settings(options.task, aloud))


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the question that the flags ask."""
    given = {name: getattr(options, name) for name in ("system", "prompt", "media")}
    values = {name: value for name, value in given.items() if value}
    return values | ({"tokens": read_id_file(options.tokens)} if options.tokens else {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", required=True, metavar=" | ".join(TASKS))
    for name, what in TASKS.items():
        _add_flags(tasks.add_parser(name, help=what, description=what))


def _add_flags(task: argparse.ArgumentParser) -> None:
    add_model_flags(task)
    add = task.add_argument_group("the question").add_argument
    add("--prompt", metavar="TEXT", help="what is asked; for tts, what is said")
    add("--system", metavar="TEXT", help="system prompt")
    for kind in ("image", "audio", "video"):
        told = f"{kind} before the prompt; all media stand in the order in which they are given here"
        add(f"--{kind}", dest="media", const=kind, nargs="+", action=_InOrder, metavar="FILE", help=told)
    add("--tokens", type=Path, metavar="FILE.json", help="the prompt as a list of token ids, instead of all above")
    add("--manifest", type=Path, metavar="FILE.jsonl", help="many questions, one a line")
    add("--interactive", action="store_true", help="several turns; /help tells of its commands")
    add = task.add_argument_group("the answer").add_argument
    add("--out", type=Path, metavar="FILE.wav", help="the answer's speech; asks for an answer aloud")
    add("--save", type=Path, metavar="FILE.json", help="text, tokens, log-probabilities, code frames, times")
    add("--output", type=Path, metavar="FILE.jsonl", help="answers to --manifest")
    add("--speech", action="store_true", help="answers to --manifest aloud; sound lies in the folder OUTPUT_audio")
    add_settings_flags(add)


class _InOrder(argparse.Action):
    """Adds files to one list for media of all kinds: `--image a --audio b --image c` keeps this order."""

    def __call__(self, parser, options, paths, flag=None) -> None:
        options.media = [*(options.media or []), *({"type": self.const, "path": path} for path in paths)]


def check_flags(options: argparse.Namespace) -> None:
    if bool(options.manifest) != bool(options.output):
        raise ConfigError("--manifest and --output go together")
    asked = [name for name in ("prompt", "media", "tokens", "out", "save") if getattr(options, name)]
    asked = [options.media[0]["type"] if name == "media" else name for name in asked]
    if options.manifest and (asked or options.interactive):
        raise ConfigError(f"--manifest brings the questions: --{asked[0] if asked else 'interactive'} is not for it")
    if options.interactive and (options.task != "chat" or options.tokens or options.save):
        raise ConfigError("--interactive is for chat, without --tokens and --save")
    if options.task == "asr" and (options.out or options.speech):
        raise ConfigError("asr writes down; it does not answer aloud")
    if options.speech and not options.manifest and not options.out:
        raise ConfigError("--speech without --manifest needs --out, where the speech goes")
    if options.task == "tts" and not (options.manifest or options.out or options.save):
        raise ConfigError("tts needs --out, where the speech goes")
    if options.out and options.out.suffix.lower() != ".wav":
        raise ConfigError(f"--out {options.out} must end in .wav")
    check_folders(options, "out", "save", "output")
