"""What README and docs say exists: commands with their flags, settings, extras, links, files and modules.

Nothing is run: a command is started up to the point where it has parsed its arguments.
"""

import argparse
import ast
import dataclasses
import itertools
import re
import runpy
import shlex
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from baichuan_omni_jax import __version__
from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import AUDIO_RUNS, STAGES, RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ROOT / "docs" / "reference" / "api"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if GENERATED not in p.parents and "_build" not in p.parts),
]
FOLDERS = ("baichuan_omni_jax", "data_pipelines", "configs", "launch", "tests", "benchmarks", "tools", "docs")
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The present documentation: not what was decided or changed once.
PRESENT = [p for p in PAGES if p.name != "CHANGELOG.md" and p.parent.name != "decisions"]
# The start page, and decisions that have no number yet.
UNLISTED = ("index.md", "decisions.md")


class Parsed(BaseException):
    """Raised once a command has parsed its arguments."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code_blocks(text: str) -> Iterator[str]:
    """Yields fenced blocks of shell commands, and indented ones."""
    yield from re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from (
        "\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^ {4}.*\n)+", prose, re.M)
    )


def commands(text: str) -> list[str]:
    """Lists the whole commands of a page, without what is set before them and without comments."""
    found = []
    spans = re.findall(r"`((?:python|baichuan-omni) [^`\n]* --[^`\n]*)`", text)
    for block in (*code_blocks(text), *spans):
        for line in re.sub(r"\\\n\s*", " ", block).split("\n"):
            line = re.sub(r"\s+#.*", "", re.split(r"&&|;|\|", line.strip())[0])
            line = re.sub(r"^(?:\w+=\S* )+|\s*&$", "", line.strip())
            if "'" not in line:  # what is optional stands in brackets
                line = line.replace(" ...]", "]").replace("[", "").replace("]", "")
            if (
                re.match(r"(python|baichuan-omni|pip) (?!COMMAND)", line)
                and "..." not in line
                and line.count('"') % 2 == 0
            ):
                found.append(line)
    return list(dict.fromkeys(found))


COMMANDS = [
    pytest.param(c, id=f"{name_of(p)}: {c[:60]}") for p in PAGES for c in commands(p.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_parses(command, monkeypatch, capsys):
    program, *arguments = shlex.split(command)
    if program == "baichuan-omni":
        parse(lambda: sys.exit(main(arguments)), arguments, monkeypatch, capsys)
    elif program == "pip" or arguments[:2] == ["-m", "pip"]:
        check_install(arguments)
    elif arguments[0] == "-m" and arguments[1].split(".")[0] in FOLDERS:
        module = arguments[1]
        parse(lambda: runpy.run_module(module, run_name="__main__"), arguments[2:], monkeypatch, capsys)
    elif arguments[0].startswith("launch/"):
        parse(lambda: runpy.run_path(arguments[0], run_name="__main__"), arguments[1:], monkeypatch, capsys)
    elif arguments[0].endswith(".py"):
        assert (ROOT / arguments[0]).exists(), f"{arguments[0]} does not exist"
    check_overrides(arguments)


def parse(start, arguments: list[str], monkeypatch, capsys) -> None:
    """Starts a command as if from the shell and stops it when its arguments are parsed."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        real(self, args, namespace)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            start()
        except Parsed:
            return
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")
        except SystemExit as exit:
            if exit.code == 0:  # --help
                return
            pytest.fail(f"{shlex.join(arguments)}: exit {exit.code}: {capsys.readouterr().err}")
    pytest.fail(f"{shlex.join(arguments)}: nothing parsed the arguments")


def check_install(arguments: list[str]) -> None:
    """Checks that the extras which a pip command names exist."""
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        unknown = set(extras.split(",")) - set(METADATA["optional-dependencies"])
        assert not unknown, f"no extras {unknown}"


def check_overrides(arguments: list[str]) -> None:
    """Checks that `--set` names settings of the configuration that `--config` names; placeholders are left out."""
    pairs = list(itertools.pairwise(arguments))
    named = [value for flag, value in pairs if flag == "--config"]
    by_name = (*AUDIO_RUNS, *STAGES)
    configs = [value if value in by_name else ROOT / value for value in named]
    configs = [config for config in configs if config in by_name or Path(config).exists()]
    # A stage reads the sizes of its model, which a reader makes first.
    placeholder = r"a\.b=|model=weights/|.*=[A-Z_]+$"
    settings = [value for flag, value in pairs if flag == "--set" and not re.match(placeholder, value)]
    for config in configs:
        load_run_config(config, settings)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as MyST and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert ROOT in file.parents, f"{target} lies outside the repository"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{path} does not exist"
    for name in re.findall(r"\b((?:baichuan_omni_jax|data_pipelines)(?:\.\w+)+)", text):
        assert resolves(name), f"{name} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_a_page_imports_what_exists(page):
    for block in re.findall(r"^```(?:\{code-cell\} )?python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        code = "\n".join(line for line in block.splitlines() if not line.startswith((":tags:", "%")))
        if block.lstrip().startswith("%%") or "\n%%" in block:
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOLDERS:
                for alias in node.names:
                    assert resolves(f"{node.module}.{alias.name}"), f"{node.module} has no {alias.name}"


def settings(kind: object, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of a configuration's fields, those of its parts too."""
    if dataclasses.is_dataclass(kind):
        for name, inner in typing.get_type_hints(kind).items():
            yield prefix + name
            for part in (inner, *typing.get_args(inner)):
                yield from settings(part, f"{prefix}{name}.")


SETTINGS = set(settings(RunConfig))
FILES = r"\.(?:py|json|safetensors)$"
SECTIONS = "|".join(field.name for field in dataclasses.fields(RunConfig))


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_settings_that_a_page_names_exist(page):
    found = re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+)(?==\S*`|`)", page.read_text(encoding="utf-8"))
    unknown = {name for name in found if name.rstrip(".") not in SETTINGS and not re.search(FILES, name)}
    assert not unknown


def resolves(name: str) -> bool:
    """Tells whether a dotted name is a module, or is defined in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.exists():
                return end == len(parts) or parts[end] in defined(file)
        if base.is_dir() and end == len(parts):
            return True
    return False


def defined(file: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def test_the_readme_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_one_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_page_is_in_the_site():
    """A page that no table of contents names is found by nobody."""
    docs = ROOT / "docs"
    listed = set()
    for page in PAGES:
        if docs in page.parents:
            for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
                entries = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith(":")]
                listed.update((page.parent / f"{entry}.md").resolve() for entry in entries)
    missing = [name_of(p) for p in PAGES if docs in p.parents and p not in listed and p.name not in UNLISTED]
    assert not missing
