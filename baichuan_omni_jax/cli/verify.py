"""Proves a conversion: golden inputs through converted weights, against golden outputs of the released model.

    baichuan-omni verify --fixtures DIR [--json FILE] [--only vision,rvq]
    baichuan-omni verify --hf HF_DIR --checkpoint DIR [--json FILE]

Converts DIR/model.safetensors and DIR/vocoder.safetensors by the tables of `baichuan_omni_jax/convert/`, runs every
check in fp32 on the CPU and prints a table. With --hf the reference is the released PyTorch code, which is run from
HF_DIR (needs the extra `parity`), and the language model of the converted checkpoint DIR is held against it. Exit
code 0: all passed. 1: one failed, or a golden tensor was not checked. 2: something given cannot be used, the
message says what.
"""

import argparse
import json
import math
import time
from dataclasses import asdict

import jax
from rich.console import Console
from rich.table import Table

from baichuan_omni_jax.cli.common import check_folders, quiet_logs
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.given import given_file, given_input
from baichuan_omni_jax.verify import CHECKS, Comparison, verify, verify_released


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `verify`."""
    parser.add_argument("--fixtures", metavar="DIR", type=given_input, help="config, weights and golden files")
    parser.add_argument("--hf", metavar="HF_DIR", type=given_input, help="released weights and code; the code is run")
    parser.add_argument("--checkpoint", metavar="DIR", type=given_input, help="what HF_DIR was converted to")
    parser.add_argument("--json", metavar="FILE", type=given_file, help="also write the report here")
    parser.add_argument("--only", default="", metavar="A,B", help=f"only these of {', '.join(CHECKS)}")


def run(options: argparse.Namespace) -> int:
    """Runs `verify`; returns its exit code."""
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
