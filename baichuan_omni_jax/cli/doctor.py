"""Looks this machine over before a run: what holds, what does not, and what to do about it. Takes up to two minutes.

    baichuan-omni doctor [--workdir DIR_OR_URL] [--json FILE]
    baichuan-omni doctor --multihost [...]      # on every host of a slice
    baichuan-omni doctor --short [...]          # seconds: without what is measured

Versions beside what is asked for; devices and topology; free memory and disk; the workdir written, listed, read back
and committed to; every kernel against its reference on this device, values and gradients; matrix products, memory and
collectives beside what the chip can do; kernels' times; one tiny training step twice. A line each: ok, warn or fail.
Exit code 0: nothing failed. 1: something did. 2: something given cannot be used, the message says what.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from baichuan_omni_jax.cli.common import add_host_arguments, check_folders, join_hosts, quiet_logs
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.given import given_file

if TYPE_CHECKING:
    from rich.console import Console

    from baichuan_omni_jax.doctor import Line

_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `doctor`."""
    add = parser.add_argument
    add("--workdir", default="", metavar="DIR", help="where a run would write, a folder or a URL as gs://BUCKET/DIR")
    add("--json", type=given_file, metavar="FILE", help="also write the lines here, with their numbers")
    add(
        "--short", action="store_true", help="without kernels, rates and the training step: before every start of a run"
    )
    about = "the devices that must be there; default: JAX_PLATFORMS, else what the machine has"
    add("--expect", choices=("cpu", "gpu", "tpu"), help=about)
    add_host_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Returns 0 where no line of any host fails, else 1."""
    check_folders(options, "json")
    quiet_logs()
    join_hosts(options)
    # Only now: a check may need JAX, which then knows of the other hosts.
    from rich.console import Console

    from baichuan_omni_jax.doctor import CHECKS, Hosts, Setting, Verdict, examine, lines_of_all_hosts

    start = time.monotonic()
    hosts = Hosts.joined()
    setting = Setting(options.workdir, options.expect, hosts)
    console, lines = Console(highlight=False, soft_wrap=True), []
    begun: dict[str, float] = {}
    # Lines come as they are found: whatever hangs, what was found before can be read, and stderr says what hangs.
    with Console(stderr=True).status("looking") as status:

        def begin(name: str) -> None:
            begun[name] = time.monotonic()
            status.update(f"looking at {name}")

        for line in examine([check for check in CHECKS if not (options.short and check.long)], setting, begin):
            lines.append(line)
            print_line(console, line)
    everything = lines_of_all_hosts(hosts, lines)
    seconds = time.monotonic() - start

    # Of the other hosts only what is not as it should be, and once, on host 0.
    if hosts.index == 0:
        for line in everything:
            if line.host != 0 and line.verdict is not Verdict.OK:
                print_line(console, line, f"host {line.host}: ")
        if options.json:
            ends = [*list(begun.values())[1:], start + seconds]
            write_report(
                options.json, everything, {name: end - begun[name] for name, end in zip(begun, ends, strict=True)}
            )
    counts = {verdict: sum(line.verdict is verdict for line in everything) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    console.print(f"{told}, {seconds:.0f} s" + (f", {hosts.count} hosts" if hosts.count > 1 else ""))
    return 1 if counts[Verdict.FAIL] else 0


def print_line(console: "Console", line: "Line", before: str = "") -> None:
    """Prints a line, and below it what to do."""
    from rich.markup import escape

    color = _COLORS[line.verdict]
    console.print(f"[{color}]{line.verdict:<5}[/]{line.check:<13}{escape(before + line.text)}")
    if line.advice:
        console.print(f"{'':<18}-> {escape(line.advice)}")


def write_report(path: Path, lines: Sequence["Line"], seconds: dict[str, float]) -> None:
    """Writes all hosts' lines, and this host's seconds of every check, as JSON.

    Raises ConfigError when the file cannot be written.
    """
    from baichuan_omni_jax.storage import write_json

    report = {
        "passed": not any(line.verdict == "fail" for line in lines),
        "seconds": {name: round(each, 1) for name, each in seconds.items()},
        "lines": [asdict(line) for line in lines],
    }
    # Through JSON once: numbers that are none (an infinite error) are written as text.
    text = json.dumps(report, ensure_ascii=False)
    try:
        write_json(path, json.loads(text, parse_constant=str))
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror}") from error
