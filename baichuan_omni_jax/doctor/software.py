"""Versions beside what is asked for: Python and packages, the accelerator's own, and between hosts.

What is asked for stands in pyproject.toml of a checkout, else in the installed package's metadata; what a recipe
installs, and preflight compiled with, in a constraints file of the accelerator under launch/recipes, where there is
one.
"""

import json
import os
import platform
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from baichuan_omni_jax.coordination import COMPARED, installed
from baichuan_omni_jax.doctor.machine import expected_platform
from baichuan_omni_jax.doctor.report import Hosts, Line, Platform, Setting, Verdict, join
from baichuan_omni_jax.errors import list_some

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "baichuan_omni_jax"
# Of the environment: what changes the programs that are compiled.
COMPARED_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
# The extras of JAX that bring what drives the devices, the first where none is there yet; and ours that asks for it.
_EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {"tpu": (("tpu",), "tpu"), "gpu": (("cuda12", "cuda13"), "cuda")}


def check_versions(setting: Setting) -> Iterator[Line]:
    """Compares Python, every required package and the accelerator's own with what is asked for; then the hosts."""
    expected, _ = expected_platform(setting.expect)
    asked_python, requirements = asked_for()
    yield _python_line(asked_python)

    # Required packages: one line where all is well, one for each that is not.
    names = sorted({str(canonicalize_name(each.name)) for each in requirements})
    found = {name: installed(name) for name in names}
    bad = [line for each in requirements if (line := _requirement_line(each))]
    if not bad:
        shown = ", ".join(f"{name} {found.get(name) or installed(name)}" for name in COMPARED if installed(name))
        text = f"{len(found)} required packages are as asked for ({shown})"
        yield Line("versions", Verdict.OK, text, values=found)
    yield from bad
    yield from _accelerator_lines(expected)
    yield from _constraint_lines(expected)
    if setting.hosts.count > 1:
        yield from host_lines(setting.hosts, host_facts())


def asked_for() -> tuple[str, list[Requirement]]:
    """Reads which Python, and which packages at which versions, are asked for: those that apply on this machine."""
    project = ROOT / "pyproject.toml"
    if project.is_file():
        # Newer than the metadata of an editable installation, which is that of the day it was installed.
        told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, texts = told["requires-python"], told["dependencies"]
    else:
        python, texts = metadata.metadata(PROJECT)["Requires-Python"] or "", metadata.requires(PROJECT) or []
    requirements = [Requirement(text) for text in texts]
    return python, [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _python_line(asked: str) -> Line:
    version = platform.python_version()
    text = f"Python {version} (asked for: {asked or 'any'})"
    if SpecifierSet(asked).contains(version, prereleases=True):
        return Line("versions", Verdict.OK, text, values={"python": version})
    return Line("versions", Verdict.FAIL, text, "make an environment of another Python: uv venv --python 3.12")


def _requirement_line(asked: Requirement) -> Line | None:
    """Says how a package differs from what is asked for; None where it does not."""
    version = installed(asked.name)
    if version and asked.specifier.contains(version, prereleases=True):
        return None
    text = f"{asked.name} {version} is not {asked.specifier}" if version else f"{asked.name} is not installed"
    return Line("versions", Verdict.FAIL, text, f"pip install '{asked}'")


def _accelerator_lines(expected: Platform) -> Iterator[Line]:
    """JAX and jaxlib fit one another, and what drives the devices fits them."""
    jax_version, jaxlib = installed("jax"), installed("jaxlib")
    if jax_version.rpartition(".")[0] != jaxlib.rpartition(".")[0]:
        text = f"jax {jax_version} with jaxlib {jaxlib}: they are released together"
        yield Line("versions", Verdict.FAIL, text, f"pip install 'jaxlib=={jax_version}'")
    if expected not in _EXTRAS:
        return
    extras, ours = _EXTRAS[expected]
    extra = next((name for name in extras if installed(f"jax-{name}-plugin")), extras[0])
    # JAX's own metadata say which libtpu, or CUDA plugin, this version of it goes with.
    for text in metadata.requires("jax") or []:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}) or not asked.marker.evaluate({"extra": extra}):
            continue
        version = installed(asked.name)
        if not version:
            yield Line(
                "versions",
                Verdict.FAIL,
                f"{asked.name} is not installed, and a {expected.upper()} is expected here",
                f"pip install 'baichuan_omni_jax[{ours}]'",
            )
        elif asked.specifier.contains(version, prereleases=True):
            yield Line("versions", Verdict.OK, f"{asked.name} {version}", values={asked.name: version})
        else:
            text = f"{asked.name} {version}; jax {jax_version} is released with {asked.specifier}"
            yield Line("versions", Verdict.WARN, text, f"pip install '{asked.name}{asked.specifier}'")


def constraints_file(expected: Platform, folder: Path | None = None) -> Path | None:
    """Finds the constraints file of an accelerator: a text file below launch/recipes whose name has both words."""
    folder = ROOT / "launch" / "recipes" if folder is None else folder
    words = {"gpu": ("gpu", "cuda")}.get(expected, (expected,))
    files = sorted(path for path in folder.rglob("*.txt") if "constraint" in str(path.relative_to(folder)))
    return next((path for path in files if any(word in path.stem.lower() for word in words)), None)


def _constraint_lines(expected: Platform) -> Iterator[Line]:
    """Compares with the versions that a recipe installs: others may work, but nobody compiled for them."""
    path = constraints_file(expected)
    if path is None:
        return
    pins = read_constraints(path)
    others = {
        name: f"{name} {version} instead of {str(asked).removeprefix('==')}"
        for name, asked in pins.items()
        if (version := installed(name)) and not asked.contains(version, prereleases=True)
    }
    if others:
        text = f"other versions than {path.name} has: {list_some(list(others.values()), ', ')}"
        yield Line("versions", Verdict.WARN, text, f"pip install -c {path} 'baichuan_omni_jax'")
    else:
        yield Line("versions", Verdict.OK, f"as {path.name} has them, as far as installed ({len(pins)} packages)")


def read_constraints(path: Path) -> dict[str, SpecifierSet]:
    """Reads a constraints file of pip's: name -> versions; what is no plain requirement is passed over."""
    pins: dict[str, SpecifierSet] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # Comments, options (`-c`, `--hash`) and the backslashes before hashes are none of our business.
        text = line.partition(" #")[0].partition("--hash")[0].strip().rstrip("\\").strip()
        if not text or text[0] in "#-":
            continue
        try:
            asked = Requirement(text)
        except InvalidRequirement:
            continue
        if asked.marker is None or asked.marker.evaluate():
            pins[canonicalize_name(asked.name)] = asked.specifier
    return pins


def host_facts() -> dict[str, str]:
    """Collects what all hosts must have alike: versions, this project's sources, variables that change programs."""
    from baichuan_omni_jax.train.hosts import version_facts

    facts = {"Python": platform.python_version()} | {name: installed(name) or "absent" for name in COMPARED}
    facts["the code of this project"] = version_facts()["the code's version"]
    return facts | {name: os.environ.get(name, "not set") for name in COMPARED_VARIABLES}


def host_lines(hosts: Hosts, facts: Mapping[str, str]) -> Iterator[Line]:
    """Compares facts between hosts; names for each difference the odd hosts, those that are not as most are."""
    told = hosts.gather("versions", json.dumps(dict(facts)))
    silent = [f"host {host}" for host, text in enumerate(told) if text is None]
    if silent:
        yield Line("hosts", Verdict.FAIL, f"no word from {join(silent)}", "is the command running there?")
    known = {host: json.loads(text) for host, text in enumerate(told) if text is not None}
    differing = 0
    for name in facts:
        values = {host: other.get(name, "absent") for host, other in known.items()}
        if len(set(values.values())) == 1:
            continue
        differing += 1
        # Most hosts are right; of a tie, host 0 and those like it.
        usual = max(Counter(values.values()).items(), key=lambda pair: (pair[1], pair[0] == values[min(values)]))[0]
        odd: dict[str, list[str]] = {}
        for host, value in values.items():
            if value != usual:
                odd.setdefault(value, []).append(f"host {host}")
        parts = ", ".join(f"{value} on {join(where)}" for value, where in odd.items())
        most = join([f"host {host}" for host, value in values.items() if value == usual][:4])
        advice = f"give {join(sorted({host for where in odd.values() for host in where}))} the same as {most}"
        yield Line("hosts", Verdict.FAIL, f"{name}: {parts}; {usual} on {most}", advice)
    if not silent and not differing:
        yield Line("hosts", Verdict.OK, f"{hosts.count} hosts: versions, sources and compiler flags are the same")
