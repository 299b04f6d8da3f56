"""What all commands share: the parser, flags that mean the same everywhere, logging, checks before the work."""

import argparse
import difflib
import faulthandler
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from absl import logging

from baichuan_omni_jax.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """Refuses a command line with one sentence, as ConfigError; `--help` shows every flag."""

    def __init__(self, *args, **options):
        # An abbreviation that fits one flag today fits two, or another, tomorrow.
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    # The stubs have overloads by the namespace's type, of which nothing here makes use.
    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parses as argparse does, but leaves nothing over: the parser that knows the flags says what is wrong."""
        options, unknown = super().parse_known_args(args, namespace)
        # A subcommand hands what it does not know to the parser above, which knows even less.
        if unknown:
            self.error(_describe_unknown(unknown[0], list(self._option_string_actions)))
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError with argparse's message in our words."""
        # argparse lists all that is missing; the first is enough for one sentence.
        if missing := re.match(r"the following arguments are required: ([^,]+)", message):
            message = f"{missing[1]} must be given"
        message = message.removeprefix("argument ")
        raise ConfigError(message if "write --set" in message else f"{message} (see --help)")


def _describe_unknown(argument: str, known: Sequence[str]) -> str:
    """Says why `argument` belongs to no flag, and which flag or spelling was likely meant."""
    if argument.startswith("-") and len(argument) > 1:
        flag = argument.partition("=")[0]
        # 0.75 is close: a letter or two, not another word.
        nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.75)
        return f"there is no flag {flag}" + (f"; the nearest known one is {nearest[0]}" if nearest else "")
    # Without `--set` before it an override would be passed over in silence, and the run be another one.
    return f"{argument!r} belongs to no flag" + (f": write --set {argument}" if "=" in argument else "")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--set`, which name a run in every command that reads one."""
    about = "the run's file, as in configs/, or the name of a stage, as sft"
    parser.add_argument("--config", required=True, metavar="FILE", help=about)
    add_set_argument(parser, "override of one key, as data.root=DIR; may be repeated")


def add_set_argument(parser: argparse._ActionsContainer, help: str) -> None:
    """Adds `--set KEY=VALUE`, collected in `options.set`."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags by which several hosts find each other (`join_hosts`)."""
    add = parser.add_argument_group("several hosts").add_argument
    add("--multihost", action="store_true", help="join the other hosts of the slice (jax.distributed) first")
    add("--coordinator", default="", metavar="HOST:PORT", help="of host 0; found by itself on TPU, Slurm and Open MPI")
    add("--hosts", type=int, default=0, metavar="N", help="how many hosts there are, where --coordinator is given")
    add("--host", type=int, default=-1, metavar="N", help="which of them this one is, from 0, with --coordinator")


def join_hosts(options: argparse.Namespace) -> None:
    """Joins the other hosts where `--multihost` says that there are any: before anything else of JAX."""
    if options.multihost:
        # Here, so that commands without this flag import no JAX for it.
        from baichuan_omni_jax.train.hosts import join

        join(options.coordinator, options.hosts, options.host)


def quiet_logs() -> None:
    """Lets through warnings alone: Orbax and Grain would tell every file they touch."""
    logging.set_verbosity(logging.WARNING)


def start_logging() -> None:
    """Prepares a process that runs for hours: warnings alone, with their time and place, and a stack if it crashes.

    For the life of the process: whatever logs gets absl's form.
    """
    quiet_logs()
    logging.use_absl_handler()
    if not faulthandler.is_enabled():
        faulthandler.enable()


def check_folders(options: object, *names: str) -> None:
    """Before minutes of work: raises ConfigError naming the first file `options.NAME` (or None) without a folder."""
    for name in names:
        path = getattr(options, name)
        if path and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise ConfigError(f"--{name} {path} is a folder")
