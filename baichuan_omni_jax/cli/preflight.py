"""Does a run fit a TPU slice, or GPUs? Compiles its real training step for them, on a machine that has neither.

    pip install -e '.[preflight]'      # for GPUs: '.[cuda]'
    baichuan-omni preflight --config configs/omni_64k.py --topology v5p:4x4x4 [--json FILE] [--plot FILE.png]
    baichuan-omni preflight --config sft --sweep model=omni_1b5,omni_3b --sweep machine=v5e:2x4,v6e:2x4

Prints, for one chip, memory by part, parameters and optimizer by group and collectives, and the step's model FLOPs;
what to change where it does not fit. Exit code 0: it fits. 1: it does not. 2: something given cannot be used, the
message says what.
"""

import argparse
import json
import math
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from baichuan_omni_jax.cli.common import add_run_arguments, check_folders
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.given import given_file

if TYPE_CHECKING:
    from baichuan_omni_jax.train.preflight import Report

# Before JAX starts: compiling is a matter for the CPU, and others may use libtpu at the same time. Without the last
# three libtpu looks for the TPU machine that this is not, and complains at length.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `preflight`."""
    add_run_arguments(parser)
    add = parser.add_argument
    add("--topology", metavar="TYPE:AxBxC", help="the slice, as v5p:4x4x4, or h100:1; default: `machine` of the config")
    add("--slices", type=int, metavar="N", help="how many of them; default: mesh.slices of the config")
    about = "try every combination of settings, `topology` and `slices` among them; may be repeated"
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help=about)
    add("--json", type=given_file, metavar="FILE", help="also write the report here, of a sweep all of them")
    add("--plot", type=given_file, metavar="FILE.png", help="also draw it (needs the extra `show`)")
    add("--tokens", type=float, metavar="N", help="say how many hours so many tokens would take, as 1e12")
    add("--price", type=float, metavar="X", help="of a chip and hour: say what they would cost (with --tokens)")
    add("--mean", type=float, metavar="N", help="tokens of a document, for the FLOPs (default 3000)")
    add("--sigma", type=float, metavar="X", help="spread of the lengths' logarithm (default 1.2)")
    add("--image-patches", "--picture", type=int, metavar="N", help="of an image, for the FLOPs (default 1024)")


def run(options: argparse.Namespace) -> int:
    """Returns 0 where the run (of a sweep any) fits, 1 where it does not. Raises ConfigError naming what cannot be
    used.
    """
    # Before minutes of compiling: what cannot be used, and files that could not be written.
    for name in ("tokens", "price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be a positive number, not {value:g}")
    if options.price is not None and options.tokens is None:
        raise ConfigError("--price needs --tokens: what is paid for")
    check_folders(options, "json", "plot")
    if options.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'baichuan_omni_jax[show]'")
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _sweep(options) if options.sweep else _one(options)


def _one(options: argparse.Namespace) -> int:
    # Only now: these import JAX.
    from rich.console import Console

    from baichuan_omni_jax.train.preflight.render import cost_sentence, plot, print_report

    report, console = _report(options, {}), Console()
    # The report for people, for programs, as a figure; the exit code is the answer.
    print_report(console, report)
    if options.tokens:
        if report.time is None:
            console.print(f"no time is predicted for {report.topology} and this task, so no hours", soft_wrap=True)
        else:
            console.print(cost_sentence(report, report.time, options.tokens, options.price), soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(report, options.plot)
    return 0 if report.fits else 1


def _sweep(options: argparse.Namespace) -> int:
    from rich.console import Console

    from baichuan_omni_jax.train.preflight.sweep import parse_sweep, plot_sweep, sweep, sweep_table

    cells, console, combinations = [], Console(), parse_sweep(options.sweep)
    for cell in sweep(combinations, lambda settings: _report(options, settings)):
        cells.append(cell)
        said = ", ".join(f"{key}={value}" for key, value in cell.settings.items())
        console.print(f"{len(cells)} of {len(combinations)}: {said}", soft_wrap=True)
        # Each is minutes of work: what is done is there if the next is interrupted.
        if options.json:
            text = json.dumps([each.to_json() for each in cells], indent=1)
            options.json.write_text(f"{text}\n", encoding="utf-8")
    console.print(sweep_table(cells))
    if options.plot:
        plot_sweep(cells, options.plot)
    return 0 if any(cell.report is not None and cell.report.fits for cell in cells) else 1


def _report(options: argparse.Namespace, settings: dict[str, str]) -> "Report":
    """Compiles the run of the command line with these settings more, `topology` and `slices` among them."""
    from baichuan_omni_jax.config import load_run_config, resolve_model
    from baichuan_omni_jax.train.preflight import Packing, preflight

    # The run as training would read it, with what the command line says of the slice.
    slices = settings.get("slices", options.slices)
    sets = [f"{key}={value}" for key, value in settings.items() if key not in ("topology", "slices")]
    sets += [] if slices is None else [f"mesh.slices={slices}"]
    run = load_run_config(options.config, [*options.set, *sets])
    # `Packing` has the defaults, in a module that imports JAX: flags that are not given are left out.
    given = {"mean": options.mean, "sigma": options.sigma, "image_patches": options.image_patches}
    packing = Packing(**{name: value for name, value in given.items() if value is not None})
    topology = settings.get("topology") or options.topology or run.machine
    if not topology:
        raise ConfigError(f"--topology must be given: {options.config} is for no machine of its own")
    return preflight(run, resolve_model(run.model), topology, packing)
