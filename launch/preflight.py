"""Does a run fit a TPU slice? Compiles its real training step for the slice, without a TPU.

    pip install -e '.[preflight]'
    python launch/preflight.py --config configs/omni_64k.py --topology v5p:4x4x4 [--json FILE] [--plot FILE.png]

Prints, for one chip, memory by part, parameters and optimizer by group and collectives, and the step's model FLOPs;
what to change where it does not fit. Exit code 0: it fits. 1: it does not. 2: something given cannot be used, the
message says what.
"""

import os

# Before JAX starts: compiling is a matter for the CPU, and others may use libtpu at the same time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Else libtpu looks for the TPU machine that this is not, and complains at length.
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from baichuan_omni_jax.config import apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.train.preflight import Packing, Report, preflight
from baichuan_omni_jax.train.preflight.tables import print_report


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the run's file in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of one key")
    parser.add_argument("--topology", required=True, help="the slice, such as v5p:4x4x4")
    parser.add_argument("--slices", type=int, help="how many of them; default: mesh.slices of the config")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it (needs the extra `show`)")
    packing = Packing()
    parser.add_argument("--mean", type=float, default=packing.mean, help="tokens of a document, for the FLOPs")
    parser.add_argument("--sigma", type=float, default=packing.sigma, help="spread of the lengths' logarithm")
    parser.add_argument("--picture", type=int, default=packing.picture, help="patches of a picture, for the FLOPs")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    reports: list[Report] = []

    def work() -> None:
        check_outputs(args)
        changes = [*args.set, *([f"mesh.slices={args.slices}"] if args.slices is not None else [])]
        run = apply_overrides(load_run_config(args.config), changes)
        packing = Packing(mean=args.mean, sigma=args.sigma, picture=args.picture)
        reports.append(preflight(run, resolve_model(run.model), args.topology, packing))

    code = exit_code(work)
    if code:
        return code
    report = reports[0]
    print_report(Console(), report)
    if args.json:
        args.json.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from baichuan_omni_jax.train.preflight.plot import plot

        plot(report, args.plot)
    return 0 if report.fits else 1


def check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of compiling: raises ConfigError for files that could not be written."""
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{option} {path}: {path.absolute().parent} is not a folder")
    if args.plot and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'baichuan_omni_jax[show]'")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
