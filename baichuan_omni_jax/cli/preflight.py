"""Does a run fit a TPU slice, or GPUs? Compiles its real training step for them, on a machine that has neither.

    pip install -e '.[preflight]'      # for GPUs: '.[cuda]'
    baichuan-omni preflight --config configs/omni_64k.py --topology v5p:4x4x4 [--json FILE] [--plot FILE.png]

Prints, for one chip, memory by part, parameters and optimizer by group and collectives, and the step's model FLOPs;
what to change where it does not fit. Exit code 0: it fits. 1: it does not. 2: something given cannot be used, the
message says what.
"""

import argparse
import json
import math
import os
from importlib.util import find_spec

from baichuan_omni_jax.cli.common import add_run_arguments, check_folders
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.given import given_file

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
    add("--json", type=given_file, metavar="FILE", help="also write the report here")
    add("--plot", type=given_file, metavar="FILE.png", help="also draw it (needs the extra `show`)")
    add("--tokens", type=float, metavar="N", help="say how many hours so many tokens would take, as 1e12")
    add("--price", type=float, metavar="X", help="of a chip and hour: say what they would cost (with --tokens)")
    add("--mean", type=float, metavar="N", help="tokens of a document, for the FLOPs (default 3000)")
    add("--sigma", type=float, metavar="X", help="spread of the lengths' logarithm (default 1.2)")
    add("--image-patches", "--picture", type=int, metavar="N", help="of an image, for the FLOPs (default 1024)")


def run(options: argparse.Namespace) -> int:
    """Returns 0 where the run fits, 1 where it does not. Raises ConfigError naming what cannot be used."""
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
    # Only now: these import JAX.
    from rich.console import Console

    from baichuan_omni_jax.config import load_run_config, resolve_model
    from baichuan_omni_jax.train.preflight import Packing, preflight
    from baichuan_omni_jax.train.preflight.render import cost_sentence, print_report

    # The run as training would read it, with what the command line says of the slice.
    slices = [] if options.slices is None else [f"mesh.slices={options.slices}"]
    run = load_run_config(options.config, [*options.set, *slices])
    # `Packing` has the defaults, in a module that imports JAX: flags that are not given are left out.
    given = {"mean": options.mean, "sigma": options.sigma, "image_patches": options.image_patches}
    packing = Packing(**{name: value for name, value in given.items() if value is not None})
    topology = options.topology or run.machine
    if not topology:
        raise ConfigError(f"--topology must be given: {options.config} is for no machine of its own")
    report = preflight(run, resolve_model(run.model), topology, packing)
    # The report for people, for programs, as a figure; the exit code is the answer.
    print_report(Console(), report)
    if options.tokens:
        if report.time is None:
            Console().print(f"no time is predicted for {topology} and task {run.task}, so no hours", soft_wrap=True)
        else:
            Console().print(cost_sentence(report, report.time, options.tokens, options.price), soft_wrap=True)
    if options.json:
        options.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        from baichuan_omni_jax.train.preflight.render import plot

        plot(report, options.plot)
    return 0 if report.fits else 1
