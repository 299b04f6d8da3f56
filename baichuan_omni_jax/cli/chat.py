"""A chat with a checkpoint from the command line: the flags that open it, its answers and several turns at a terminal.

`generate` and `serve` share the flags; `generate` has the terminal.
"""

import argparse
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax
import soundfile

from baichuan_omni_jax.cli.common import add_set_argument
from baichuan_omni_jax.config import GenerationConfig, ImagesConfig, MeshConfig, apply_overrides, released_images
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.chat import ChatAnswer, ChatStream, Conversation, OmniChat
from baichuan_omni_jax.generation.chat_stream import SpeechSynthesizer
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import TextDelta
from baichuan_omni_jax.generation.loading import LoadedBranches, load_for_generation, make_chat_model
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.storage.given import given_input
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor
from data_pipelines.tokenizers.tokenizer import load_tokenizer

COMMANDS_HELP = (
    "/image FILE, /audio FILE, /video FILE: goes with the next line; /new: a new conversation; /quit: the end.\n"
    "Ctrl-C stops an answer."
)


@dataclass(frozen=True)
class OpenedChat:
    """A chat, and what to tell the user of its checkpoint.

    Attributes:
        chat: what answers.
        engine: what generates for it.
        notice: lines about untrained branches, and about what makes the waveform; "" when there is nothing to say.
        takes_audio: whether the checkpoint has the branches that encode audio.
        branches: all that the checkpoint has.
    """

    chat: OmniChat
    engine: Engine
    notice: str
    takes_audio: bool
    branches: frozenset[str] = frozenset()


def add_model_arguments(parser: argparse.ArgumentParser, data_flag: str = "--data", required: bool = True) -> None:
    """Adds the flags that name a checkpoint and size its engine.

    `data_flag` is the mesh axis' flag where `--data` means something else, and `required` whether the checkpoint must
    be named.
    """
    add = parser.add_argument_group("the model").add_argument
    add(
        "--checkpoint",
        required=required,
        metavar="DIR|branch=DIR,...",
        help="checkpoint or workdir, whole or by branch",
    )
    add("--tokenizer", type=given_input, metavar="FILE", help="tokenizer.json; default: that of the checkpoint")
    add(
        "--images",
        choices=("seen", "released"),
        help="stills as a person sees them or as the released processor takes them (default: as the run trained)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the language model (default: float32 on a CPU)")
    add("--cache-dtype", choices=("float32", "bfloat16", "int8"), help="of the cache (default: as --dtype)")
    add("--slots", type=_positive, default=8, metavar="N", help="requests served at a time (default %(default)s)")
    add("--length", type=_positive, default=4096, metavar="N", help="prompt and answer at most (default %(default)s)")
    add(
        data_flag,
        dest="data",
        type=_positive,
        default=1,
        metavar="N",
        help="devices that share the slots (default %(default)s)",
    )
    add("--tensor", type=_positive, default=1, metavar="N", help="devices that share each slot (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default %(default)s)")


def add_sampling_arguments(parser: argparse._ActionsContainer) -> None:
    """Adds the flags of a GenerationConfig: how answers are sampled, and how long they may grow."""
    add = parser.add_argument
    add("--max-tokens", type=int, metavar="N", help="text tokens of one answer at most")
    add("--voice", metavar="NAME", help="who speaks, as the system prompt names it; not beside --system")
    add("--greedy", action="store_true", help="always the likeliest, no penalty")
    add_set_argument(parser, "a field of GenerationConfig, as codes.top_k=3; may be repeated")


def generation_config(options: argparse.Namespace, default: GenerationConfig) -> GenerationConfig:
    """Returns `default` with what the flags change. Raises ConfigError naming the field that cannot be set."""
    settings = apply_overrides(default, options.set)
    # The short flags come after `--set`, and win over it.
    if options.max_tokens is not None:
        settings = apply_overrides(settings, [f"max_tokens={options.max_tokens}"])
    if options.voice is not None:
        if options.system:
            raise ConfigError("--system takes the place of the system prompt that names the --voice: name it there")
        settings = replace(settings, voice=options.voice)
    return settings.greedy() if options.greedy else settings


def open_chat(
    options: argparse.Namespace, settings: GenerationConfig, root: Path | None = None, *, speaks: bool = True
) -> OpenedChat:
    """Reads the checkpoint and makes its engine.

    Args:
        options: the flags of `add_model_arguments`.
        settings: how answers are generated where a request says nothing else.
        root: the only folder that messages may name files of; None: any.
        speaks: whether an answer may be spoken; else nothing is said of how.

    Raises:
        ConfigError: names the flag, the file or the branch that cannot be used.
    """
    # Mesh: the slots are split over `data`, the weights and the cache's heads over `tensor`.
    devices = jax.devices()
    wanted = options.data * options.tensor
    if wanted > len(devices):
        raise ConfigError(f"--data {options.data} --tensor {options.tensor} needs {wanted} devices, not {len(devices)}")
    mesh = make_mesh(MeshConfig(data=options.data, tensor=options.tensor), devices[:wanted])
    # A CPU computes bfloat16 slower than float32.
    dtype = options.dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    loaded = load_for_generation(options.checkpoint, mesh=mesh, dtype=dtype)
    path = options.tokenizer or loaded.tokenizer
    tokenizer = load_tokenizer(path) if path else None
    # Before the engine, which takes long to make: the processor refuses a tokenizer of another model.
    images = {"seen": ImagesConfig(), "released": released_images()}.get(options.images, loaded.images)
    processor = ChatPrompts(Processor(loaded.config, tokenizer, images=images), root) if tokenizer else None
    model = make_chat_model(
        loaded,
        tokenizer,
        slots=options.slots,
        length=options.length,
        cache_dtype=options.cache_dtype,
        seed=options.seed,
    )
    chat = OmniChat(model, processor, settings=settings, seed=options.seed)
    takes_audio = {"audio_encoder", "audio_head"} <= loaded.branches.keys()
    assert isinstance(model.engine, Engine)
    notice = _notice(loaded, model.speech_decoder if speaks else None)
    return OpenedChat(chat, model.engine, notice, takes_audio, frozenset(loaded.branches))


def _notice(loaded: LoadedBranches, decoder: SpeechSynthesizer | None) -> str:
    lines, untrained = [], set(loaded.untrained)
    # Codes of a seeded tokenizer mean something to the model that learned them, though they decode to noise.
    if "audio_head" in loaded.branches and "audio_encoder" in untrained and "audio_head" not in untrained:
        untrained.remove("audio_encoder")
        lines.append(
            "untrained audio tokenizer: its codes mean something to the model trained on them, but decode to noise"
        )
    if untrained:
        meaningless = ", ".join(name for name in loaded.untrained if name in untrained)
        lines.insert(0, f"untrained, so that answers mean nothing: {meaningless}")
    if decoder is not None and decoder.vocoder == "griffin_lim":
        lines.append("no vocoder branch: Griffin and Lim's iteration makes the waveform")
    return "\n".join(lines)


def print_note(text: str) -> None:
    """Prints to standard error, beside the answer."""
    print(text, file=sys.stderr, flush=True)


def print_answer(stream: ChatStream) -> ChatAnswer:
    """Prints the text as it is made, or at the end the tokens where there is no tokenizer; Ctrl-C ends the answer."""
    # Raised inside the engine, KeyboardInterrupt would cost it all that it is doing.
    before = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
    try:
        for event in stream:
            if isinstance(event, TextDelta):
                print(event.text, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    answer = stream.answer()
    print("" if answer.text else " ".join(map(str, answer.tokens)), flush=True)
    return answer


def describe_answer(answer: ChatAnswer, engine: Engine) -> str:
    """Lines of text: what was generated and why it ended, how fast, and what the engine holds."""
    finished, metrics = answer.finished, engine.metrics
    made = f"{finished.tokens} tokens" + (f" and {finished.frames} code frames" if finished.frames else "")
    # Times that an answer may lack: without a token there is no first one, without speech no first audio.
    speed = [f"{answer.tokens_per_second:.1f} tokens/s"]
    if finished.first_token is not None:
        speed.insert(0, f"first token {finished.first_token:.2f} s")
    if answer.first_audio is not None:
        speed.append(f"first audio {answer.first_audio:.2f} s")
        speed.append(f"real-time factor {answer.real_time_factor:.2f} ({answer.audio_seconds:.1f} s of speech)")
    cache = f"cache {metrics.cache_bytes / 2**20:.1f} MiB, {metrics.compiles} programs compiled"
    return f"{finished.prompt} tokens read, {made} made: {finished.finish_reason}\n{', '.join(speed)}\n{cache}"


def run_terminal(opened: OpenedChat, fields: Mapping[str, Any], out: Path | None) -> None:
    """Reads lines until they end, and answers each as a turn of a conversation.

    Args:
        opened: what answers.
        fields: `system`, and `prompt` and `media` that go with the first turn (`generate.start_request`).
        out: where speech goes, OUT-1.wav, OUT-2.wav, ...; None: nowhere.
    """
    print_note(COMMANDS_HELP)
    # The flags' text and media are the first turn, before anything is read.
    system = fields.get("system", "")
    conversation, turns = Conversation(opened.chat, system), 0
    media = list(fields.get("media", []))
    line: str | None = fields.get("prompt") or _read_line()
    while line is not None and line != "/quit":
        word, _, rest = line.partition(" ")
        if word == "/new":
            conversation, media = Conversation(opened.chat, system), []
        elif word in ("/image", "/audio", "/video") and rest.strip():
            media.append({"type": word[1:], "path": rest.strip()})
        elif word[:1] == "/":
            print_note(COMMANDS_HELP)
        elif line or media:
            # A turn, with the media that were named since the last one.
            turns += 1
            content = [*media, *([{"type": "text", "text": line}] if line else [])]
            media = []
            _answer_turn(opened.engine, conversation, content, out and out.with_stem(f"{out.stem}-{turns}"))
        line = _read_line()


def _answer_turn(engine: Engine, conversation: Conversation, content: list[dict[str, Any]], out: Path | None) -> None:
    try:
        # Not `stream=False`, which alone gives a whole answer.
        answer = print_answer(cast(ChatStream, conversation.say(content)))
    except RequestError as error:
        print_note(f"error: {error}")
        return
    if out and len(answer.samples):
        soundfile.write(out, answer.samples, answer.rate)
        print_note(f"{out}: {answer.audio_seconds:.1f} s at {answer.rate} Hz")
    print_note(describe_answer(answer, engine))


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
