"""Answers requests with a checkpoint: chat, speech recognition, text to speech, descriptions.

    baichuan-omni generate chat --checkpoint runs/tiny --prompt "What is a star?"
    baichuan-omni generate chat --checkpoint DIR --image cat.jpg --prompt "What is this?" --out answer.wav
    baichuan-omni generate chat --checkpoint DIR --interactive
    baichuan-omni generate asr --checkpoint llm=A,audio_head=A,audio_encoder=B --audio speech.wav
    baichuan-omni generate tts --checkpoint DIR --prompt "Good morning." --out morning.wav
    baichuan-omni generate chat --checkpoint DIR --manifest requests.jsonl --output answers.jsonl

The answer goes to standard output as it is made, everything else to standard error. `--out` asks for speech too. A
manifest's lines have the fields that the flags have (`prompt`, `system`, `image`, `audio`, `video`, or `messages`, or
`tokens`); media stand before the text, in the order in which they are given. Started again, the same command goes on
after the last line that it answered. docs/how-to/generate.md says more.
Exit code 2: something given cannot be used, the message says what. 130: Ctrl-C, but for answers that it ends early.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import soundfile

from baichuan_omni_jax.cli.chat import (
    OpenedChat,
    add_model_arguments,
    add_sampling_arguments,
    describe_answer,
    generation_config,
    open_chat,
    print_answer,
    print_note,
    run_terminal,
)
from baichuan_omni_jax.cli.common import check_folders, quiet_logs
from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.batch_requests import Question, answer_questions, read_questions
from baichuan_omni_jax.generation.chat import ChatAnswer, ChatStream, OmniChat
from baichuan_omni_jax.storage.given import given_file, given_input, given_manifest
from data_pipelines.documents.document import encode_ids, read_id_file
from data_pipelines.documents.manifest import open_manifest
from data_pipelines.documents.prompt_writing import ASR_PROMPT

TASKS = {
    "chat": "answers a prompt, with images, audio and video",
    "asr": "transcribes a recording",
    "tts": "speaks the prompt",
    "describe": "describes an image or a video",
}
FIELDS = ("system", "prompt", "image", "audio", "video", "media", "messages", "tokens")
# Of all kinds the order of the flags or fields is kept; these three name one kind each.
_MEDIA = ("image", "audio", "video")
_DESCRIBE = {"image": "Describe the picture.", "video": "Describe the video."}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the tasks and their flags."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar=" | ".join(TASKS))
    for name, what in TASKS.items():
        task = tasks.add_parser(name, help=what, description=what)
        add_model_arguments(task)
        add = task.add_argument_group("the request").add_argument
        add("--prompt", metavar="TEXT", help="the user's text; for tts, the text to speak")
        add("--system", metavar="TEXT", help="system prompt")
        for kind in _MEDIA:
            order = f"{kind} before the prompt; all media stand in the order in which they are given here"
            add(f"--{kind}", dest="media", const=kind, nargs="+", action=_InOrder, metavar="FILE", help=order)
        add(
            "--tokens",
            type=given_input,
            metavar="FILE.json",
            help="the prompt as a list of token ids, instead of all above",
        )
        add("--manifest", type=given_manifest, metavar="FILE.jsonl", help="many requests, one a line")
        add("--interactive", action="store_true", help="several turns; /help tells of its commands")
        group = task.add_argument_group("the answer")
        add = group.add_argument
        add("--out", type=given_file, metavar="FILE.wav", help="the answer's speech; asks for a spoken answer")
        add("--save", type=given_file, metavar="FILE.json", help="text, tokens, log-probabilities, code frames, times")
        add("--output", type=given_file, metavar="FILE.jsonl", help="answers to --manifest")
        add("--speech", action="store_true", help="spoken answers to --manifest; audio lies in the folder OUTPUT_audio")
        add_sampling_arguments(group)


class _InOrder(argparse.Action):
    """Adds files to one list for media of all kinds: `--image a --audio b --image c` keeps this order."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        paths = [values] if isinstance(values, str) else list(values or [])
        namespace.media = [*(namespace.media or []), *({"type": self.const, "path": path} for path in paths)]


def run(options: argparse.Namespace) -> None:
    """Answers what the flags ask. Raises ConfigError, also where the one request cannot be served."""
    quiet_logs()
    check_flags(options)
    try:
        generate(options)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go together, before the checkpoint is read."""
    if bool(options.manifest) != bool(options.output):
        raise ConfigError("--manifest and --output go together")
    # What one request alone has, by the flag that the user wrote: `media` stands for three of them.
    given = [name for name in ("prompt", "media", "tokens", "out", "save") if getattr(options, name)]
    given = [options.media[0]["type"] if name == "media" else name for name in given]
    if options.manifest and (given or options.interactive):
        raise ConfigError(f"--manifest brings the requests: --{given[0] if given else 'interactive'} is not for it")
    if options.interactive and (options.task != "chat" or options.tokens or options.save):
        raise ConfigError("--interactive is for chat, without --tokens and --save")
    if options.task == "asr" and (options.out or options.speech):
        raise ConfigError("asr transcribes; it does not speak")
    if options.speech and not options.manifest and not options.out:
        raise ConfigError("--speech without --manifest needs --out, where the speech goes")
    if options.task == "tts" and not (options.manifest or options.out or options.save):
        raise ConfigError("tts needs --out, where the speech goes")
    if options.out and options.out.suffix.lower() != ".wav":
        raise ConfigError(f"--out {options.out} must end in .wav")
    check_folders(options, "out", "save", "output")


def generate(options: argparse.Namespace) -> None:
    """Answers one request, the lines of a terminal, or a manifest. Raises ConfigError and RequestError."""
    # All that can be refused without the checkpoint comes before it is read.
    fields = request_fields(options)
    questions = read_questions(options.manifest, _manifest_bytes) if options.manifest else []
    opened = open_chat(options, settings := answer_config(options), speaks=options.task == "tts" or settings.speech)
    if opened.notice:
        print_note(opened.notice)
    if options.manifest:
        _answer_manifest(options, opened, questions)
    elif options.interactive:
        run_terminal(opened, fields, options.out)
    else:
        answer = print_answer(start_request(opened.chat, options.task, fields))
        _write_answer(options, answer)
        print_note(describe_answer(answer, opened.engine))


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields (`FIELDS`) of the request that the flags make."""
    given = {name: getattr(options, name) for name in ("system", "prompt", "media")}
    fields = {name: value for name, value in given.items() if value}
    return fields | ({"tokens": read_id_file(options.tokens)} if options.tokens else {})


def answer_config(options: argparse.Namespace) -> GenerationConfig:
    """The released demos' settings with what the flags change; of several transcripts the likeliest is wanted."""
    # Text to speech has a request of its own, which speaks whatever `speech` says.
    speech = options.task != "tts" and bool(options.speech or options.out)
    default = GenerationConfig(text=SamplingConfig()) if options.task == "asr" else GenerationConfig(speech=speech)
    return generation_config(options, default)


def _manifest_bytes(path: Path) -> bytes:
    """What a manifest holds, plain or compressed."""
    with open_manifest(path, str(path)) as file:
        return file.read()


def _write_answer(options: argparse.Namespace, answer: ChatAnswer) -> None:
    if options.save:
        options.save.write_text(json.dumps(answer_fields(answer), ensure_ascii=False) + "\n", encoding="utf-8")
    # A spoken answer may be text alone: the model decides when it speaks.
    if options.out and not len(answer.samples):
        print_note(f"no speech was made, so {options.out} was not written")
    elif options.out:
        soundfile.write(options.out, answer.samples, answer.rate)
        print_note(f"{options.out}: {answer.audio_seconds:.1f} s at {answer.rate} Hz")


def answer_fields(answer: ChatAnswer) -> dict[str, Any]:
    """The answer as JSON fields, without waveforms. Times are seconds from the request."""
    finished = answer.finished
    fields = {
        "text": answer.text,
        "finish": finished.finish_reason,
        "tokens": list(answer.tokens),
        "logprobs": [round(value, 5) for value in answer.logprobs],
        "prompt_tokens": finished.prompt,
        "first_token": finished.first_token,
        "seconds": answer.seconds,
    }
    if answer.speech:
        fields |= {
            "codes": [stretch.tolist() for stretch in answer.speech],
            "first_audio": answer.first_audio,
            "audio_seconds": answer.audio_seconds,
            "rate": answer.rate,
        }
    return fields


def _answer_manifest(options: argparse.Namespace, opened: OpenedChat, questions: list[Question]) -> None:
    chat, folder = opened.chat, options.output.with_name(f"{options.output.stem}_audio")
    base = options.manifest.parent

    def record(question: Question, answer: ChatAnswer) -> dict[str, Any]:
        fields = answer_fields(answer)
        # Named by the line, so that a restart writes the same file again.
        if len(answer.samples):
            folder.mkdir(exist_ok=True)
            path = folder / f"{question.line:06d}.wav"
            soundfile.write(path, answer.samples, answer.rate)
            fields["audio"] = str(path)
        return fields

    def start(question: Question) -> ChatStream:
        # Its key follows from its line: the same answer whatever was answered before a restart.
        return start_request(chat, options.task, question.values, jax.random.fold_in(chat.key, question.line), base)

    # Twice as many as there are slots: while some are decoded, the next are prepared.
    try:
        outcomes = answer_questions(
            questions, options.output, start, record, at_once=2 * options.slots, report=print_note
        )
    except KeyboardInterrupt:
        sentence = f"stopped: {options.output} keeps what is answered, the same command goes on"
        raise KeyboardInterrupt(sentence) from None
    metrics = opened.engine.metrics
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common()) or "no request"
    print_note(f"{options.output}: {counts}; {metrics.tokens_per_s:.1f} tokens/s, {metrics.compiles} programs compiled")


def start_request(
    chat: OmniChat, task: str, fields: Mapping[str, Any], key: jax.Array | None = None, base: Path = Path()
) -> ChatStream:
    """Submits one request to the chat.

    Args:
        chat: what answers.
        task: one of `TASKS`.
        fields: of `FIELDS`. `image`, `audio` and `video` are paths or lists of paths; `media` is a list of
            `{"type", "path"}` of all kinds. Media stand before the text, in the order of the fields.
        key: of sampling; None: the chat's next.
        base: the folder that paths start from.

    Returns:
        The answer as it comes.

    Raises:
        RequestError: fields that this task cannot use, and what `OmniChat.reply` raises.
    """
    if unknown := [field for field in fields if field not in FIELDS]:
        raise RequestError("bad_message", f"there is no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    media = [_rebase(part, base) for part in _media(fields)]
    # None of these calls asks for a whole answer (`stream=False`).
    return cast(ChatStream, _submit(chat, task, fields, media, key, base))


def _submit(
    chat: OmniChat,
    task: str,
    fields: Mapping[str, Any],
    media: list[dict[str, Any]],
    key: jax.Array | None,
    base: Path,
) -> ChatStream | ChatAnswer:
    """Submits a request whose fields are known and whose media have their paths."""
    kinds = [part["type"] for part in media]
    given = [*(field for field in fields if field not in (*_MEDIA, "media")), *kinds]
    # A prompt or a conversation that is given whole leaves nothing to add.
    if "tokens" in fields:
        _allow_only(given, task, "tokens")
        return _start_ids(chat, task, fields["tokens"], key)
    if "messages" in fields:
        _allow_only(given, task, "messages")
        messages = fields["messages"]
        if task != "chat" or not isinstance(messages, list):
            raise RequestError("bad_message", "messages are a list, and for chat")
        return chat.reply([_rebase_message(message, base) for message in messages], key=key)
    # Speech tasks have the released prompts, without roles; the others are turns of a conversation.
    if task == "tts":
        _allow_only(given, task, "prompt")
        return chat.speak(_text(fields, "prompt"), key=key)
    if task == "asr":
        _allow_only(given, task, "prompt", "audio")
        if len(media) != 1:
            raise RequestError("bad_message", f"asr takes one recording (audio), not {len(media)}")
        return chat.complete([{"type": "text", "text": _text(fields, "prompt", ASR_PROMPT)}, *media], key=key)
    # Media may stand without text; without media the text is required (None: it has no default).
    default = "" if media else None
    if task == "describe":
        first = next((kind for kind in ("image", "video") if kind in kinds), None)
        if first is None:
            raise RequestError("bad_message", "describe takes an image or a video")
        default = _DESCRIBE[first]
    return chat.reply(user_turn(fields, media, default), key=key)


def user_turn(fields: Mapping[str, Any], media: list[dict[str, Any]], default: str | None) -> list[dict[str, Any]]:
    """The messages of one turn: the system prompt, then media and text of the user (`default` where none is given)."""
    text, system = _text(fields, "prompt", default), _text(fields, "system", "")
    content = [*media, *([{"type": "text", "text": text}] if text else [])]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


def _start_ids(chat: OmniChat, task: str, ids: Any, key: jax.Array | None) -> ChatStream | ChatAnswer:
    """A prompt of token ids; one to be spoken ends with the token that begins speech."""
    config = chat.model.config
    prompt = encode_ids(ids, config)
    if task != "tts":
        return chat.answer_prompt(prompt, key=key)
    start = config.tokens.audiogen_start
    return chat.speak_prompt(prompt if ids[-1] == start else encode_ids([*ids, start], config), key=key)


def _rebase_message(message: Any, base: Path) -> Any:
    """The message with media paths from `base`; what is wrong with it is for the processor to say."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_rebase(part, base) for part in message["content"]]}


def _rebase(part: Any, base: Path) -> Any:
    usable = isinstance(part, dict) and isinstance(part.get("path"), str) and part["path"]
    return part | {"path": str(base / part["path"])} if usable else part


def _allow_only(given: Iterable[str], task: str, *fields: str) -> None:
    if superfluous := [field for field in given if field not in fields]:
        raise RequestError("bad_message", f"{task} with {' and '.join(fields)} cannot use {superfluous[0]}")


def _text(fields: Mapping[str, Any], field: str, default: str | None = None) -> str:
    found = fields.get(field, default)
    if not isinstance(found, str):
        raise RequestError("bad_message", f"{field} is missing" if found is None else f"{field} is no text")
    return found


def _media(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parts of all kinds, in the order in which the fields stand."""
    parts: list[dict[str, Any]] = []
    for field, found in fields.items():
        if field in _MEDIA:
            parts += [{"type": field, "path": path} for path in (found if isinstance(found, list) else [found])]
        elif field == "media":
            # One list of all kinds, where the order between kinds matters.
            fits = lambda part: isinstance(part, dict) and set(part) == {"type", "path"} and part["type"] in _MEDIA  # noqa: E731
            if not isinstance(found, list) or not all(map(fits, found)):
                raise RequestError("bad_message", 'media is no list of {"type": "image" | "audio" | "video", "path"}')
            parts += found
    return parts
