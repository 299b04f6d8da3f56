"""The flags that name a checkpoint, and the chat that they open: shared by the command and the page."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jax

from baichuan_omni_jax.config import GenerationConfig, ImagesConfig, MeshConfig, released_images
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.chat import OmniChat
from baichuan_omni_jax.generation.chat_stream import SpeechSynthesizer
from baichuan_omni_jax.generation.loading import LoadedBranches, load_for_generation, make_chat_model
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor
from data_pipelines.tokenizers.tokenizer import load_tokenizer


class OneSentenceParser(argparse.ArgumentParser):
    """Errors are one sentence, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class Opened:
    """`notice` says what the user should know of the checkpoint: untrained branches, what makes the waveform; `hears`
    whether it has the branches to hear with."""

    chat: OmniChat
    notice: str
    hears: bool


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add("--checkpoint", required=True, metavar="DIR|branch=DIR,...", help="checkpoint or workdir, whole or by branch")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; default: that of the checkpoint")
    add(
        "--images",
        choices=("seen", "released"),
        help="stills as a person sees them or as the released processor takes them (default: as the run trained)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the language model (default: float32 on a CPU)")
    add("--cache-dtype", choices=("float32", "bfloat16", "int8"), help="of the cache (default: as --dtype)")
    add("--slots", type=_positive, default=8, metavar="N", help="requests served at a time (default %(default)s)")
    add("--length", type=_positive, default=4096, metavar="N", help="prompt and answer at most (default %(default)s)")
    add("--data", type=_positive, default=1, metavar="N", help="devices that share the slots")
    add("--tensor", type=_positive, default=1, metavar="N", help="devices that share each slot")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (default %(default)s)")


def open_chat(options: argparse.Namespace, settings: GenerationConfig, root: Path | None = None) -> Opened:
    """Reads the checkpoint. `root`: the only folder that messages may name files of.

    Raises ConfigError naming the flag, the file or the branch that cannot be used.
    """
    devices = jax.devices()
    wanted = options.data * options.tensor
    if wanted > len(devices):
        raise ConfigError(f"--data {options.data} --tensor {options.tensor} needs {wanted} devices, not {len(devices)}")
    mesh = make_mesh(MeshConfig(data=options.data, tensor=options.tensor), devices[:wanted])
    dtype = options.dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
    loaded = load_for_generation(options.checkpoint, mesh=mesh, dtype=dtype)
    path = options.tokenizer or loaded.tokenizer
    tokenizer = load_tokenizer(path) if path else None
    # Refuses a tokenizer of another model before the engine is made.
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
    hears = {"audio_encoder", "audio_head"} <= loaded.branches.keys()
    return Opened(chat, _notice(loaded, model.speech_decoder), hears)


def _notice(loaded: LoadedBranches, speaker: SpeechSynthesizer | None) -> str:
    lines, untrained = [], set(loaded.untrained)
    # Codes of a seeded tokenizer mean something to the model that learned them, though they decode to no sound.
    if "audio_head" in loaded.branches and "audio_encoder" in untrained and "audio_head" not in untrained:
        untrained.remove("audio_encoder")
        lines.append(
            "untrained audio tokenizer: its codes mean something to the model trained on them, but are no sound"
        )
    if untrained:
        meaningless = ", ".join(name for name in loaded.untrained if name in untrained)
        lines.insert(0, f"untrained, so that answers mean nothing: {meaningless}")
    if speaker is not None and speaker.vocoder == "griffin_lim":
        lines.append("no vocoder branch: Griffin and Lim's iteration makes the waveform")
    return "\n".join(lines)


def say(text: str) -> None:
    """To the user, beside the answer."""
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
