"""Commands on weights: `convert` between Hugging Face folders and checkpoints, `verify` what was converted."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from baichuan_omni_jax.branches import CONVERTED_BRANCHES, MODEL_BRANCHES
from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.checkpoint.branches import CONFIG
from baichuan_omni_jax.cli.common import check_folders, quiet_logs
from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.convert import convert_to_jax, convert_to_torch, open_source, plan_to_jax, plan_to_torch
from baichuan_omni_jax.convert.files import missing_code
from baichuan_omni_jax.convert.plan import describe_plan
from baichuan_omni_jax.convert.safetensors_io import SINGLE
from baichuan_omni_jax.convert.to_jax import tokenizer_from_whisper
from baichuan_omni_jax.convert.to_torch import SHARD_BYTES, TOKENIZER, CheckpointSource, convert_to_qwen2, plan_qwen2
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import check_target, read_json_object
from baichuan_omni_jax.verify import CHECKS, Comparison, verify, verify_released


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands of `convert` and their flags."""
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    to_jax = commands.add_parser("to-jax", help="Hugging Face folder -> checkpoint")
    to_jax.add_argument("--from", dest="source", required=True, metavar="HF_DIR", help="the released folder")
    to_jax.add_argument("--vocoder", metavar="FILE", help="hift.pt or .safetensors, vocoder_config.json next to it")
    to_jax.add_argument("--branches", default="", metavar="A,B", help=f"only these of {','.join(MODEL_BRANCHES)}")
    to_torch = commands.add_parser("to-torch", help="checkpoint or workdir -> Hugging Face folder")
    qwen2 = commands.add_parser("to-qwen2", help="language model of a checkpoint or workdir -> Qwen2ForCausalLM folder")
    # What several of them share, in the order in which `--help` shows it.
    for command in (to_torch, qwen2):
        command.add_argument("--from", dest="source", required=True, metavar="DIR", help="DIR or branch=DIR,...")
        command.add_argument("--base", metavar="DIR", help="where branches and files that --from lacks come from")
        command.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as stored")
        command.add_argument(
            "--shard-mb", type=int, default=SHARD_BYTES >> 20, help="largest file (default %(default)s)"
        )
    whisper = commands.add_parser("from-whisper", help="Whisper checkpoint -> branch audio_encoder, to be trained")
    whisper.add_argument("--from", dest="source", required=True, metavar="WHISPER_DIR", help="as Hugging Face has it")
    whisper.add_argument("--model", default="baichuan_omni_7b", help="name or config.json (default %(default)s)")
    for command in (to_jax, to_torch, qwen2, whisper):
        command.add_argument("--to", dest="target", required=True, metavar="DIR", help="must not hold anything yet")
    for command in (to_jax, to_torch, qwen2):
        command.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def run_convert(options: argparse.Namespace) -> None:
    """Moves weights between a Hugging Face folder and a checkpoint of ours (docs/how-to/weights.md).

        baichuan-omni convert to-jax --from HF_DIR [--vocoder hift.pt] --to DIR
        baichuan-omni convert to-torch --from DIR [--base CONVERTED_DIR] --to HF_DIR
        baichuan-omni convert to-qwen2 --from DIR --to HF_DIR
        baichuan-omni convert from-whisper --from WHISPER_DIR --to DIR [--model MODEL]

    `--dry-run` prints the plan and writes nothing. `to-qwen2` writes the language model alone, as a `Qwen2ForCausalLM`
    that transformers and vLLM load. `from-whisper` makes a new audio tokenizer with Whisper's encoder. Exit code 2:
    something given cannot be used, the message says what.
    """
    quiet_logs()
    # Conversion is the host's work: an accelerator, if there is one, is left alone.
    jax.config.update("jax_platforms", "cpu")
    COMMANDS[options.command](options)


def to_jax(options: argparse.Namespace) -> None:
    """Converts a Hugging Face folder to a checkpoint."""
    source, target = Path(options.source).expanduser(), Path(options.target).expanduser()
    vocoder = Path(options.vocoder).expanduser() if options.vocoder else None
    branches = tuple(filter(None, options.branches.split(",")))
    for name in branches:
        if name not in MODEL_BRANCHES:
            raise ConfigError(f"--branches names {name!r}; the model has {', '.join(MODEL_BRANCHES)}")
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


def to_qwen2(options: argparse.Namespace) -> None:
    """Converts the language model of a checkpoint to a Qwen2ForCausalLM folder."""
    target, source = _open_export(options)
    export = plan_qwen2(source, options.dtype)
    _print(describe_plan(export.plan, rules=options.dry_run))
    if not options.dry_run:
        with _progress(export.nbytes) as advance:
            convert_to_qwen2(source, target, export=export, shard_bytes=options.shard_mb << 20, advance=advance)
        _print(f"wrote {target}: a Qwen2ForCausalLM of {export.dtype}, for transformers and vLLM without other code")
        if not (target / TOKENIZER).is_file():
            _print(
                f"{source.home} brings no {TOKENIZER}: put the tokenizer's files beside the weights, or name another"
            )


def _print(text: str) -> None:
    """Prints at once, also into a pipe: conversion takes minutes."""
    print(text, flush=True)


def _open_export(options: argparse.Namespace) -> tuple[Path, CheckpointSource]:
    """Returns the folder to write, which holds nothing yet, and the branches to read."""
    target = Path(options.target).expanduser()
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


def from_whisper(options: argparse.Namespace) -> None:
    """Makes a checkpoint of a new audio tokenizer with the encoder of a Whisper folder."""
    source, target = Path(options.source).expanduser(), Path(options.target).expanduser()
    check_target(target)
    cfg = resolve_model(options.model)
    save_branches(target, {"audio_encoder": tokenizer_from_whisper(source, cfg)}, cfg)
    _print(f"wrote {target}: audio_encoder with Whisper's encoder; bridge and codebooks are random")


COMMANDS = {"to-jax": to_jax, "to-torch": to_torch, "to-qwen2": to_qwen2, "from-whisper": from_whisper}


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar on stderr: share done, bytes, bytes a second, time left. Yields what moves it on by bytes."""
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("converting", total=total)
        yield lambda done: progress.advance(task, done)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `verify`."""
    parser.add_argument("--fixtures", metavar="DIR", type=Path, help="config, weights and golden files")
    parser.add_argument("--hf", metavar="HF_DIR", type=Path, help="released weights and code; the code is run")
    parser.add_argument("--checkpoint", metavar="DIR", type=Path, help="what HF_DIR was converted to")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the report here")
    parser.add_argument("--only", default="", metavar="A,B", help=f"only these of {', '.join(CHECKS)}")


def run_verify(options: argparse.Namespace) -> int:
    """Proves a conversion: golden inputs through converted weights, against golden outputs of the released model.

        baichuan-omni verify --fixtures DIR [--json FILE] [--only vision,rvq]
        baichuan-omni verify --hf HF_DIR --checkpoint DIR [--json FILE]

    Converts DIR/model.safetensors and DIR/vocoder.safetensors by the tables of `baichuan_omni_jax/convert/`, runs every
    check in fp32 on the CPU and prints a table. With --hf the reference is the released PyTorch code, which is run from
    HF_DIR (needs the extra `parity`), and the language model of the converted checkpoint DIR is held against it. Exit
    code 0: all passed. 1: one failed, or a golden tensor was not checked. 2: something given cannot be used, the
    message says what.
    """
    quiet_logs()
    # The reference was computed on a CPU in fp32; an accelerator, if there is one, is left alone.
    jax.config.update("jax_platforms", "cpu")
    return 0 if compare(options) else 1


def compare(options: argparse.Namespace) -> bool:
    """Prints and writes the report; returns whether every comparison of it passed."""
    _check_sources(options)
    check_folders(options, "json")
    rows: list[Comparison] = []
    # Check by check, since each takes seconds to minutes: the line on stderr says how far it is.
    start = time.monotonic()
    with Console(stderr=True).status("comparing" if options.hf else "converting") as status:
        if options.hf:
            rows += verify_released(options.hf, options.checkpoint)
        else:
            for name, lines in verify(options.fixtures, tuple(filter(None, options.only.split(",")))):
                rows += lines
                status.update(f"{name} done, {len(rows)} tensors compared")
    seconds = time.monotonic() - start
    print_comparisons(rows, seconds)
    if options.json:
        write_comparisons(options, rows, seconds)
    return all(row.passed for row in rows)


def _check_sources(options: argparse.Namespace) -> None:
    """Raises ConfigError unless the flags name one of the two comparisons."""
    if not (options.fixtures or options.hf or options.checkpoint):
        raise ConfigError("nothing to compare: give --fixtures DIR, or --hf HF_DIR and --checkpoint DIR")
    if options.fixtures and (options.hf or options.checkpoint):
        raise ConfigError("--fixtures and --hf with --checkpoint are two comparisons: give one of them")
    if not options.fixtures and not (options.hf and options.checkpoint):
        raise ConfigError("--hf HF_DIR and --checkpoint DIR go together: one is missing")
    if options.hf and options.only:
        raise ConfigError("--only chooses among the checks of --fixtures; --hf has one")


def print_comparisons(rows: list[Comparison], seconds: float) -> None:
    """Prints a table of all comparisons, and how many failed."""
    # One row a tensor, failures in red; numbers to the right, so that exponents stand below each other.
    table = Table("check", "tensor")
    for heading in ("max abs error", "relative error", "tolerance"):
        table.add_column(heading, justify="right")
    table.add_column("pass")
    table.add_column("note")
    for row in rows:
        numbers = (f"{x:.2g}" for x in (row.max_abs_error, row.relative_error, row.tolerance))
        passed = "yes" if row.passed else "[bold red]NO[/]"
        table.add_row(row.check, row.tensor, *numbers, passed, row.note)
    # Never narrower than its rows: a report piped into a file is read there.
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    failed = sum(not row.passed for row in rows)
    console.print(f"{len(rows)} comparisons, {failed} failed, {seconds:.0f} s", highlight=False)


def write_comparisons(options: argparse.Namespace, rows: list[Comparison], seconds: float) -> None:
    """Writes the report as JSON. Raises ConfigError when it cannot be written."""
    report = {
        **{name: str(path) for name in ("fixtures", "hf", "checkpoint") if (path := getattr(options, name))},
        "passed": all(row.passed for row in rows),
        "seconds": round(seconds, 1),
        "rows": [{name: _plain(value) for name, value in asdict(row).items()} | {"passed": row.passed} for row in rows],
    }
    try:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {options.json} cannot be written: {error.strerror}") from error


def _plain(value: object) -> object:
    """Returns what JSON can hold, which knows no infinity: what could not be compared is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
