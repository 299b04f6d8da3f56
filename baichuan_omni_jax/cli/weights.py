"""Moves weights between Hugging Face folders and checkpoints of ours (docs/how-to/weights.md).

    baichuan-omni convert to-jax --from HF_DIR [--vocoder hift.pt] --to DIR
    baichuan-omni convert to-torch --from DIR [--base CONVERTED_DIR] --to HF_DIR
    baichuan-omni convert from-parts --llm QWEN_DIR --vision QWEN_VL_DIR [--whisper WHISPER_DIR] --to DIR
    baichuan-omni convert to-qwen2 --from DIR --to HF_DIR
    baichuan-omni convert to-qwen2-vl --from DIR --to HF_DIR
    baichuan-omni convert to-whisper --from DIR --to HF_DIR
    baichuan-omni convert from-whisper --from WHISPER_DIR --to DIR [--model MODEL]

`from-parts` makes the checkpoint that the recipe starts from, of public models; what no part gives is random, and the
command says what that is. `to-qwen2`, `to-qwen2-vl` and `to-whisper` write one part alone, as the public model that it
has the form of. `from-whisper` makes a new audio tokenizer with Whisper's encoder. `--dry-run` prints the plan and
writes nothing. Exit code 2: something given cannot be used, the message says what.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from baichuan_omni_jax.branches import CONVERTED_BRANCHES, MODEL_BRANCHES
from baichuan_omni_jax.checkpoint.branches import CONFIG
from baichuan_omni_jax.cli.common import quiet_logs
from baichuan_omni_jax.config import OmniConfig, resolve_model
from baichuan_omni_jax.config.parts import WHISPER_SIZES
from baichuan_omni_jax.convert import convert_to_jax, convert_to_torch, open_source, plan_to_jax, plan_to_torch
from baichuan_omni_jax.convert.files import missing_code
from baichuan_omni_jax.convert.from_parts import convert_from_parts, describe_parts, plan_from_parts
from baichuan_omni_jax.convert.parts import PublicParts
from baichuan_omni_jax.convert.plan import describe_plan
from baichuan_omni_jax.convert.safetensors_io import SINGLE
from baichuan_omni_jax.convert.to_parts import TOKENIZER, convert_to_part, plan_to_part
from baichuan_omni_jax.convert.to_torch import SHARD_BYTES, CheckpointSource
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, local_path, read_json_object
from baichuan_omni_jax.storage.given import given_folder, given_input, given_manifest
from data_pipelines.tokenizers.public import read_vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `convert` and their flags."""
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    to_jax = commands.add_parser("to-jax", help="Hugging Face folder -> checkpoint")
    to_jax.add_argument(
        "--from", dest="source", required=True, metavar="HF_DIR", type=given_input, help="the released folder"
    )
    to_torch = commands.add_parser("to-torch", help="checkpoint or workdir -> Hugging Face folder")
    qwen2 = commands.add_parser("to-qwen2", help="language model of a checkpoint or workdir -> Qwen2ForCausalLM folder")
    tower = commands.add_parser("to-qwen2-vl", help="vision branch of a checkpoint or workdir -> Qwen2-VL folder")
    encoder = commands.add_parser("to-whisper", help="audio encoder of a checkpoint or workdir -> Whisper folder")
    parts = commands.add_parser("from-parts", help="Qwen2.5, Qwen2-VL and Whisper folders -> checkpoint")
    parts.add_argument("--llm", metavar="DIR", type=given_input, help="Qwen2.5 or Qwen2, of any size")
    parts.add_argument(
        "--vision", metavar="DIR", type=given_input, help="Qwen2-VL, of any size; its language model is left alone"
    )
    parts.add_argument(
        "--whisper", metavar="DIR", type=given_input, help="Whisper, of any size; its decoder is left alone"
    )
    whisper = commands.add_parser("from-whisper", help="Whisper checkpoint -> branch audio_encoder, to be trained")
    whisper.add_argument(
        "--from", dest="whisper", required=True, metavar="WHISPER_DIR", type=given_input, help="as Hugging Face has it"
    )
    # What several of them share, in the order in which `--help` shows it.
    for command in (to_torch, qwen2, tower, encoder):
        command.add_argument("--from", dest="source", required=True, metavar="DIR", help="DIR or branch=DIR,...")
        command.add_argument("--base", metavar="DIR", help="where branches and files that --from lacks come from")
        command.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored")
        command.add_argument(
            "--shard-mb", type=int, default=SHARD_BYTES >> 20, help="largest file (default %(default)s)"
        )
    for command in (to_jax, parts):
        command.add_argument(
            "--vocoder",
            metavar="FILE",
            type=given_manifest,
            help="hift.pt or .safetensors, vocoder_config.json beside it",
        )
        command.add_argument("--branches", default="", metavar="A,B", help=f"only these of {','.join(MODEL_BRANCHES)}")
    for command, what in ((parts, "sizes of what no part gives"), (whisper, "sizes that Whisper must have")):
        command.add_argument(
            "--model", default="baichuan_omni_7b", help=f"{what}: name or config.json (default %(default)s)"
        )
    for command in (to_jax, to_torch, qwen2, tower, encoder, parts, whisper):
        command.add_argument(
            "--to", dest="target", required=True, metavar="DIR", type=given_folder, help="must not hold anything yet"
        )
        command.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run(options: argparse.Namespace) -> None:
    """Runs one of the commands of `convert`."""
    quiet_logs()
    # Conversion is the host's work: an accelerator, if there is one, is left alone.
    jax.config.update("jax_platforms", "cpu")
    COMMANDS[options.command](options)


def to_jax(options: argparse.Namespace) -> None:
    """Converts a Hugging Face folder to a checkpoint."""
    source, target = local_path(options.source, "--from"), local_path(options.target, "--to")
    vocoder = local_path(options.vocoder, "--vocoder") if options.vocoder else None
    branches = _read_branches(options)
    check_target(target)
    # The plan reads headers alone: whatever does not fit is refused before anything is written.
    jobs = plan_to_jax(source, vocoder, branches)
    _print("\n".join(describe_plan(job.plan, rules=options.dry_run) for job in jobs))
    if not options.dry_run:
        with _progress(sum(job.plan.nbytes for job in jobs)) as advance:
            convert_to_jax(source, target, vocoder=vocoder, jobs=jobs, advance=advance)
        _print(f"wrote {target}")


def to_torch(options: argparse.Namespace) -> None:
    """Converts a checkpoint to a Hugging Face folder, and says what the released code needs beside it."""
    target, source = _open_export(options)
    exports = plan_to_torch(source, options.dtype)
    _print("\n".join(describe_plan(export.plan, rules=options.dry_run) for export in exports.values()))
    # What the folder will lack, and what the checkpoint has beyond the released model.
    if absent := [name for name in CONVERTED_BRANCHES if name not in source.readers]:
        _print(f"not there, so not written: {', '.join(absent)}")
    if source.left_out:
        _print(f"left out, the released model has no place for it: {', '.join(source.left_out)}")
    if not options.dry_run:
        with _progress(sum(export.nbytes for export in exports.values())) as advance:
            convert_to_torch(source, target, exports=exports, shard_bytes=options.shard_mb << 20, advance=advance)
        _print(f"wrote {target}")
        # A checkpoint may hold fp32 masters beside frozen bf16; config.json has room for one dtype.
        model = exports.get(SINGLE)
        if model and len(model.dtypes) > 1:
            kinds = " and ".join(model.dtypes)
            _print(f"tensors are {kinds}, config.json says {model.dtype}: --dtype writes all of them alike")
        _print(_what_runs_it(target))


def to_part(options: argparse.Namespace) -> None:
    """Converts one part of a checkpoint to the folder of a public model, and says how it is loaded."""
    form = options.command.removeprefix("to-")
    target, source = _open_export(options)
    export = plan_to_part(source, form, options.dtype)
    _print(describe_plan(export.plan, rules=options.dry_run))
    if options.dry_run:
        return
    with _progress(export.nbytes) as advance:
        convert_to_part(source, target, form, export=export, shard_bytes=options.shard_mb << 20, advance=advance)
    _print(f"wrote {target}: {LOADED_AS[form].format(dtype=export.dtype)}")
    if form == "qwen2" and not (target / TOKENIZER).is_file():
        _print(f"{source.home} brings no {TOKENIZER}: put the tokenizer's files beside the weights, or name another")


LOADED_AS = {
    "qwen2": "a Qwen2ForCausalLM of {dtype}, for transformers and vLLM without other code",
    "qwen2-vl": "the tower of a Qwen2-VL in {dtype}, without a language model (AutoModel.from_pretrained(DIR).visual)",
    "whisper": "the encoder of a Whisper in {dtype}, without a decoder (AutoModel.from_pretrained(DIR).encoder)",
}


def from_parts(options: argparse.Namespace) -> None:
    """Puts a checkpoint together from the folders of public models."""
    given = {name: getattr(options, name) for name in ("llm", "vision", "whisper", "vocoder")}
    paths = {name: local_path(value, f"--{name}") for name, value in given.items() if value}
    if not paths:
        raise ConfigError("no part is given: name --llm, --vision, --whisper or --vocoder")
    _write_parts(options, PublicParts(**paths), resolve_model(options.model), _read_branches(options))


def from_whisper(options: argparse.Namespace) -> None:
    """Makes a checkpoint of a new audio tokenizer with the encoder of a Whisper folder, at the sizes of a model."""
    folder, cfg = local_path(options.whisper, "--from"), resolve_model(options.model)
    # Here the model's sizes are given, and a run with that model will read the branch.
    stated = read_json_object(folder / CONFIG)
    for name in WHISPER_SIZES:
        if stated.get("model_type") == "whisper" and stated.get(name) != getattr(cfg.audio, name):
            wanted = getattr(cfg.audio, name)
            raise ConfigError(f"{folder / CONFIG}: {name} is {stated.get(name)}, the model's audio.{name} {wanted}")
    _write_parts(options, PublicParts(whisper=folder), cfg, ("audio_encoder",))


def _write_parts(options: argparse.Namespace, parts: PublicParts, model: OmniConfig, branches: tuple[str, ...]) -> None:
    """Prints the plan of a checkpoint from parts, and writes it."""
    target = local_path(options.target, "--to")
    check_target(target)
    plan = plan_from_parts(parts, model, read_vocabulary=read_vocabulary, branches=branches)
    _print(describe_parts(plan, rules=options.dry_run))
    if not options.dry_run:
        with _progress(plan.nbytes) as advance:
            convert_from_parts(plan, target, advance=advance)
        _print(f"wrote {target}; random in it: {', '.join(plan.parent.random) or 'nothing'}")


def _read_branches(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the branches that `--branches` names. Raises ConfigError for one that the model does not have."""
    branches = tuple(filter(None, options.branches.split(",")))
    for name in branches:
        if name not in MODEL_BRANCHES:
            raise ConfigError(f"--branches names {name!r}; the model has {', '.join(MODEL_BRANCHES)}")
    return branches


def _print(text: str) -> None:
    """Prints at once, also into a pipe: conversion takes minutes."""
    print(text, flush=True)


def _open_export(options: argparse.Namespace) -> tuple[Path, CheckpointSource]:
    """Returns the folder to write, which holds nothing yet, and the branches to read."""
    target = local_path(options.target, "--to")
    if options.shard_mb < 1:
        raise ConfigError(f"--shard-mb must be at least 1, not {options.shard_mb}")
    check_target(target)
    return target, open_source(options.source, options.base)


def _what_runs_it(folder: Path) -> str:
    """Says what the released code needs beside the weights, and this project does not contain."""
    if not read_json_object(folder / CONFIG).get("auto_map"):
        return (
            "its config.json names no code (auto_map): to run it with the released code, export with --base CONVERTED, "
            "which brings the released config.json, Python files and tokenizer (docs/how-to/weights.md)"
        )
    if missing := missing_code(folder):
        return f"the released code also needs, from the released folder: {', '.join(missing)} (docs/how-to/weights.md)"
    return (
        "the Python files that its config.json names are beside it (what else the demos need: docs/how-to/weights.md)"
    )


COMMANDS = {
    "to-jax": to_jax,
    "to-torch": to_torch,
    "from-parts": from_parts,
    "to-qwen2": to_part,
    "to-qwen2-vl": to_part,
    "to-whisper": to_part,
    "from-whisper": from_whisper,
}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr: share done, bytes, bytes a second, time left. Yields what moves it on by bytes."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("converting", total=total)
        yield lambda done: progress.advance(task, done)
