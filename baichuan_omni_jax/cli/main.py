"""The command `baichuan-omni`: finds the subcommand, and imports that alone."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baichuan_omni_jax import __version__
from baichuan_omni_jax.cli.common import CommandParser
from baichuan_omni_jax.errors import exit_code
from baichuan_omni_jax.storage.given import localized


@dataclass(frozen=True)
class Command:
    """One subcommand: its module, and a line of help.

    The module has `add_arguments(parser)` and `run(options)`, and its docstring is the text above the flags. A module
    of several commands has `add_NAME_arguments` and `run_NAME` of this one, and the text is that of `run_NAME`. One
    that `passes_on` its arguments leaves them to another program: its module has `run(options)` alone, and they are
    `options.arguments`.
    """

    module: str
    help: str
    name: str = ""
    passes_on: bool = False

    def load(self) -> tuple[str | None, Callable[[argparse.ArgumentParser], None], Callable]:
        """Imports the module; returns the text above the flags, what adds the flags, and what runs the command."""
        if self.passes_on:
            # Imported when it runs: the other program need not be here for the flags of all commands to be listed.
            return None, lambda parser: None, lambda options: importlib.import_module(self.module).run(options)
        module = importlib.import_module(self.module)
        # One command a module is the rule; several belong together where they work on the same thing.
        if not self.name:
            return module.__doc__, module.add_arguments, module.run
        run = getattr(module, f"run_{self.name}")
        return inspect.getdoc(run), getattr(module, f"add_{self.name}_arguments"), run


@dataclass(frozen=True)
class Group:
    """Subcommands under one word."""

    commands: dict[str, Command]
    help: str


# In the order of a first day: look at the machine, train, ask, measure, move weights, make data. Nothing here is
# imported to show the help.
CLI, DATA = "baichuan_omni_jax.cli", "data_pipelines"
COMMANDS: dict[str, Command | Group] = {
    "doctor": Command(f"{CLI}.doctor", "look this machine over before a run: what holds, and what to do"),
    "train": Command(f"{CLI}.train", "train a run of configs/, or go on with it"),
    "stages": Command(f"{CLI}.stages", "train stages one after the other, each from the last one's weights", "stages"),
    "recipe": Command(f"{CLI}.recipe", "from random weights to a model one can talk to, by one command; its report"),
    "preflight": Command(f"{CLI}.preflight", "tell whether a run fits a TPU slice, without a TPU"),
    "tokenize": Command(f"{CLI}.data", "fill the store of audio codes of a run's data", "tokenize"),
    "generate": Command(f"{CLI}.generate", "chat, transcribe, speak or describe with a checkpoint"),
    "serve": Command(f"{CLI}.serve", "serve the web page to talk to a checkpoint"),
    "evaluate": Command(f"{CLI}.evaluate", "put benchmarks to a checkpoint; measure an audio tokenizer"),
    "lm-eval": Command(
        "baichuan_omni_jax.integrations.lm_eval",
        "run lm-eval's command line with the model baichuan-omni",
        passes_on=True,
    ),
    "resynthesize": Command(f"{CLI}.evaluate", "turn speech into codes and back into a waveform", "resynthesize"),
    "convert": Command(f"{CLI}.weights", "move weights between Hugging Face folders and checkpoints"),
    "verify": Command(f"{CLI}.verify", "compare converted weights with the released computation"),
    "data": Group(
        {
            "build": Command(f"{DATA}.datasets.builder.build", "write shards with the media inside, from manifests"),
            "validate": Command(f"{DATA}.tools.validate", "read a built dataset through and tell what is wrong"),
            "stats": Command(f"{CLI}.data", "count documents and media, by type and size; loss shares", "stats"),
            "visualize": Command(f"{DATA}.tools.visualize", "draw packed rows and one document"),
            "sample": Command(f"{DATA}.sample.__main__", "write the offline sample data set"),
            "synthesize": Command(f"{DATA}.synthesis.__main__", "make new documents from those of manifests"),
            "import-seqio": Command(f"{DATA}.datasets.importers.seqio_cache", "write a seqio mixture as a data set"),
        },
        "build, check, show and make data sets",
    ),
}


class _LazyParser(CommandParser):
    """The parser of a subcommand, whose module is imported when its arguments are parsed."""

    def __init__(self, *args, command: Command | None = None, **options):
        super().__init__(*args, **options)
        self._command = command

    def fill(self) -> None:
        """Adds what the command's module says: the text above the flags, the flags, what runs it."""
        if command := self._command:
            # Once: a second time would add every flag again.
            self._command = None
            self.description, add_arguments, run = command.load()
            self.set_defaults(run=run)
            add_arguments(self)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parses after the module was imported: argparse calls it on the one subcommand that was chosen."""
        passes_on = self._command is not None and self._command.passes_on
        self.fill()
        if passes_on:
            # `--help` too is the other program's.
            options = argparse.Namespace() if namespace is None else namespace
            options.run, options.arguments = self.get_default("run"), list(args or ())
            return options, []
        return super().parse_known_args(args, namespace)


class _PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: writes the completions of all subcommands for that shell, and leaves."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        import shtab

        # The script that shtab writes is static: it must know what is else known of one chosen command.
        fill_all(parser)
        print(shtab.complete(parser, str(values)))
        parser.exit(0)


def fill_all(parser: argparse.ArgumentParser) -> None:
    """Imports the modules of all subcommands, so that `parser` knows every flag."""
    if isinstance(parser, _LazyParser):
        parser.fill()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                fill_all(own)


def make_parser() -> CommandParser:
    """The parser of all subcommands, of which each is filled when it is chosen."""
    parser = CommandParser(
        prog="baichuan-omni",
        description="Baichuan-Omni-1.5 in JAX: data, training, generation.",
        epilog="exit codes: 0 done; 1 something wanting (doctor, verify, preflight, data validate, verdicts in "
        "evaluate), or storage that refused for long; 2 something given cannot be used; 3 a run ended itself; 130 "
        "Ctrl-C. One sentence says which and why.",
        formatter_class=argparse.HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help='completions for that shell, as in: eval "$(baichuan-omni --print-completion bash)"',
    )
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Mapping[str, Command | Group]) -> None:
    choices = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_LazyParser)
    for name, command in commands.items():
        # A group's parser has no module to wait for; those below it do.
        if isinstance(command, Group):
            _add_commands(choices.add_parser(name, help=command.help, description=command.help), command.commands)
        else:
            choices.add_parser(name, command=command, help=command.help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 where the command itself found something wanting (`doctor`, `verify`, `preflight`, `data
        validate`), or storage refused it for long; 2 where something given cannot be used and 3 where a run ended
        itself, with one sentence; 130 after Ctrl-C.
    """

    def run() -> int | None:
        options = make_parser().parse_args(arguments)
        # A flag that is a `Path` though a URL was given is of a command that works on folders alone: refused here.
        with localized(options):
            return options.run(options)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
