"""The command `baichuan-omni` and the scripts of launch/: help, refusals of one sentence, completion, imports."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_omni_jax.cli.main import COMMANDS, fill_all, main, make_parser

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of all commands that can be run, each by its whole name (`prog`)."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for own in group.choices.values() for leaf in leaves(own)] or [parser]


@pytest.fixture(scope="module")
def commands() -> dict[str, argparse.ArgumentParser]:
    """Words of each command -> its parser; without those whose flags are another program's."""
    parser = make_parser()
    fill_all(parser)
    named = {leaf.prog.removeprefix("baichuan-omni "): leaf for leaf in leaves(parser)}
    return {name: leaf for name, leaf in named.items() if not getattr(COMMANDS.get(name), "passes_on", False)}


def refusal(capsys, *arguments: str) -> str:
    """The one sentence on stderr of a command line that is refused with exit code 2; stdout stays empty."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in COMMANDS)


def test_help_of_every_command_lists_every_flag(commands, capsys):
    """And what it means; `--set`, `--config` and `--multihost` too."""
    for name, parser in commands.items():
        with pytest.raises(SystemExit) as end:
            main([*name.split(), "--help"])
        assert end.value.code == 0, name
        shown = capsys.readouterr().out
        for action in parser._actions:
            assert all(flag in shown for flag in action.option_strings), (name, action)
            assert action.help, (name, action)
            assert action.help is not argparse.SUPPRESS, (name, action)
    flags = {flag for action in commands["train"]._actions for flag in action.option_strings}
    assert {"--config", "--workdir", "--set", "--multihost", "--coordinator", "--hosts", "--host"} <= flags


def test_unknown_flags_are_refused_by_every_command(commands, capsys):
    for name, parser in commands.items():
        needed = [action for action in parser._actions if action.required and action.nargs != "*"]
        given = [word for action in needed for word in (*action.option_strings[:1], "1")]
        sentence = refusal(capsys, *name.split(), *given, "--no-such-flag", "5")
        assert sentence == "there is no flag --no-such-flag (see --help)", name


def test_required_flags_are_named_by_every_command(commands, capsys):
    for name, parser in commands.items():
        needed = [action for action in parser._actions if action.required and action.nargs != "*"]
        if needed:
            first = "/".join(needed[0].option_strings) or needed[0].metavar
            assert refusal(capsys, *name.split()) == f"{first} must be given (see --help)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND must be given"),
        (["trian"], "COMMAND: invalid choice: 'trian'"),
        (["train", "--config=a.py"], "--workdir must be given"),
        (["train", "--config=a.py", "--workdir=w", "--steps", "5"], "there is no flag --steps (see --help)"),
        (["train", "--config=a.py", "--workdir=w", "--work=v"], "there is no flag --work; the nearest known one"),
        (["train", "--config=a.py", "--workdir=w", "--profil=1:2"], "there is no flag --profil; the nearest known"),
        (
            ["train", "--config=a.py", "--workdir=w", "train.steps=5"],
            "'train.steps=5' belongs to no flag: write --set train.steps=5",
        ),
        (["train", "--config=a.py", "--workdir=w", "more"], "'more' belongs to no flag (see --help)"),
        (["train", "--config=a.py", "--workdir=w", "--hosts=many"], "--hosts: invalid int value: 'many'"),
        (["train", "--config=a.py", "--workdir"], "--workdir: expected one argument"),
        (["train", "--config=sft", "--workdir=w", "--stopped-code=256"], "--stopped-code 256 is no exit code"),
        (["train", "--config=sft", "--workdir="], "'' is no path and no URL: was a variable of the shell not set?"),
        (["doctor", "--json", "/"], "--json / is a folder"),
        (["doctor", "--json", ""], "--json . is a folder"),
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_used(arguments, message, capsys):
    assert refusal(capsys, *arguments).startswith(message)


def test_what_follows_two_dashes_goes_to_every_stage():
    from baichuan_omni_jax.cli.stages import split_files

    line = ["stages", "--workdir", "w", "--set", "a=1", "one.py", "two.py", "--", "--multihost", "--hosts", "2"]
    files, passed_on = split_files(make_parser().parse_args(line).files)
    assert files == [Path("one.py"), Path("two.py")]
    assert passed_on == ["--multihost", "--hosts", "2"]
    assert split_files(make_parser().parse_args([*line[:5], "--", *line[8:]]).files) == ([], passed_on)


def test_tokenize_takes_the_old_spelling_of_a_flag():
    line = ["tokenize", "--config", "a.py"]
    for flag in ("--part_frames=7", "--part-frames=7"):
        assert make_parser().parse_args([*line, flag]).part_frames == 7


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_of_launch_are_commands(script, monkeypatch, capsys):
    """Each a few lines, importing no other: the command of `baichuan-omni` that its docstring names."""
    text = (ROOT / "launch" / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 15
    code = compile(text, script, "exec")
    monkeypatch.setattr(sys, "argv", [script, "--no-such-flag"])
    with pytest.raises(SystemExit) as end:
        exec(code, {"__name__": "__main__"})
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    command = text.split("The same as `baichuan-omni ")[1].partition("`")[0]
    assert command.split()[0] in COMMANDS
    assert f"python launch/{script} " in text


def test_the_reference_has_an_example_of_every_command(commands):
    """Each is parsed, which runs nothing; and it has every script of launch/."""
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    examples = [line for line in text.split("```")[1].splitlines() if line]
    for line in examples:
        assert callable(make_parser().parse_args(shlex.split(line)[1:]).run)
    jobs = {name for name in commands if name.startswith("data synthesize ")}
    assert all(any(line.startswith(f"baichuan-omni {name} ") for line in examples) for name in commands.keys() - jobs)
    assert all(f"`launch/{script}`" in text for script in SCRIPTS)


def test_help_imports_no_jax_and_completion_knows_every_flag():
    """In a process of its own. The completion is shtab's."""
    pytest.importorskip("shtab", reason="it comes with the package")
    code = "import sys; from baichuan_omni_jax.cli.main import main\n"
    code += "try: main(sys.argv[1:])\nexcept SystemExit: print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    shown = []
    for flags in (["--help"], ["--print-completion", "bash"]):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True, cwd=ROOT)
        shown.append(done.stdout)
    assert shown[0].splitlines()[-1] == "False"
    for flag in ("--coordinator", "--print-completion", "--shard-mb", "--topology", "--max-audio-seconds"):
        assert flag in shown[1]
