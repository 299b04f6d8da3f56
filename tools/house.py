"""Prints how easy this tree is to enter: sizes of files and functions, comments, cycles, imports against the contracts.

    python tools/house.py                       # the table, against its aims
    python tools/house.py --files 20            # also the shortest and longest files
    python tools/house.py --functions 20        # also the longest functions
    python tools/house.py --under data_pipelines/packing

Files are the modules of the two packages and `launch/`; an `__init__.py` that holds nothing but a docstring is not
counted. Imports inside functions count, imports for type checkers do not. The contracts are `[tool.importlinter]` of
pyproject.toml; `lint-imports` enforces them, this script counts what is left and needs nothing but Python. It always
exits with 0.
"""

import argparse
import ast
import dataclasses
import fnmatch
import io
import itertools
import statistics
import tokenize
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("baichuan_omni_jax", "data_pipelines")
FOLDERS = (*PACKAGES, "launch")


@dataclasses.dataclass(frozen=True)
class Module:
    """One Python file: its lines, functions, comments and what it imports of the packages."""

    path: str  # relative to the root
    name: str  # dotted
    lines: int
    comments: int  # lines that hold a comment
    functions: tuple[tuple[int, str], ...]  # (lines, name with its line)
    imports: frozenset[str]  # dotted names of modules, or of packages outside
    bare: bool  # nothing but a docstring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--under", default="", help="measure only files whose path starts so")
    parser.add_argument("--files", type=int, default=0, metavar="N", help="list the N shortest and longest files")
    parser.add_argument("--functions", type=int, default=0, metavar="N", help="list the N longest functions")
    args = parser.parse_args()
    modules = read_tree()
    counted = [m for m in modules if not m.bare and m.path.startswith(args.under)]
    print_table(counted, modules)
    if args.files:
        ordered = sorted(counted, key=lambda m: m.lines)
        for module in (*ordered[: args.files], *ordered[-args.files :]):
            print(f"{module.lines:6} {module.path}")
    if args.functions:
        longest = sorted(((n, f"{m.path}:{name}") for m in counted for n, name in m.functions), reverse=True)
        for lines, name in longest[: args.functions]:
            print(f"{lines:6} {name}")


def print_table(counted: list[Module], modules: list[Module]) -> None:
    """Prints the measures with their aims, then every cycle and every import that a contract forbids."""
    sizes = [m.lines for m in counted]
    functions = sorted(n for m in counted for n, _ in m.functions)
    cycles = find_cycles(modules)
    broken = broken_imports(modules)
    rows = [
        ("files outside tests", len(counted), "<= 215"),
        ("file, median lines", statistics.median(sizes), ">= 120"),
        ("files under 60 lines", f"{100 * sum(n < 60 for n in sizes) / len(sizes):.0f} %", ""),
        ("files over 350 lines", sum(n > 350 for n in sizes), ""),
        ("function, median lines", statistics.median(functions), ">= 9"),
        ("function, 90th percentile", functions[int(0.9 * len(functions))], ""),
        ("lines with a comment", f"{100 * sum(m.comments for m in counted) / sum(sizes):.1f} %", ">= 5 %"),
        ("files in the root of data_pipelines", count_in(counted, "data_pipelines"), "<= 4"),
        ("files in omni", count_in(counted, "baichuan_omni_jax/omni"), "<= 6"),
        ("file cycles", len(cycles), "0"),
        ("upward imports", len(broken), "0"),
    ]
    for name, value, aim in rows:
        print(f"{name:38} {value!s:>8}   {aim}")
    print()
    for folder in (*FOLDERS, *sorted({m.path.rsplit("/", 1)[0] for m in counted if m.path.count("/") > 1})):
        print_folder(folder, [m for m in counted if m.path.startswith(folder + "/")])
    for cycle in cycles:
        print("cycle:", " <-> ".join(cycle))
    for contract, importer, imported in broken:
        print(f"{contract}: {importer} -> {imported}")


def print_folder(folder: str, modules: list[Module]) -> None:
    """Prints one folder's line: files, median file, median function, share of comments."""
    if modules:
        functions = [n for m in modules for n, _ in m.functions]
        comments = 100 * sum(m.comments for m in modules) / sum(m.lines for m in modules)
        print(
            f"{folder:48} {len(modules):4} files, median {statistics.median(m.lines for m in modules):5.0f} lines; "
            f"function {statistics.median(functions or [0]):4.0f}; comments {comments:4.1f} %"
        )


def count_in(modules: list[Module], folder: str) -> int:
    """Counts the files that lie in `folder` itself."""
    return sum(m.path.rsplit("/", 1)[0] == folder for m in modules)


# Reading the tree


def read_tree(root: Path = ROOT) -> list[Module]:
    """Reads every module of the packages and `launch/`, in the order of their paths."""
    paths = sorted(p for folder in FOLDERS for p in (root / folder).rglob("*.py"))
    names = {dotted(p.relative_to(root)) for p in paths}
    return [read_module(p, p.relative_to(root), names) for p in paths]


def dotted(path: Path) -> str:
    """The module's name: `a/b.py` is a.b, `a/__init__.py` is a."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_module(path: Path, relative: Path, names: set[str]) -> Module:
    """Parses one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    docstring = [n for n in tree.body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return Module(
        path=str(relative),
        name=dotted(relative),
        lines=len(text.splitlines()),
        comments=len({t.start[0] for t in tokens if t.type == tokenize.COMMENT}),
        functions=tuple(((n.end_lineno or n.lineno) - n.lineno + 1, f"{n.lineno} {n.name}") for n in functions),
        imports=frozenset(imported_names(tree.body, names)),
        bare=relative.name == "__init__.py" and len(docstring) == len(tree.body),
    )


def imported_names(body: Iterable[ast.AST], names: set[str]) -> Iterable[str]:
    """Yields the modules that statements import, those inside functions too, without `if TYPE_CHECKING:`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported_names(node.orelse, names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module
        else:
            yield from imported_names(ast.iter_child_nodes(node), names)


# Cycles


def find_cycles(modules: list[Module]) -> list[list[str]]:
    """Finds the groups of files that import each other in a circle (strongly connected components of two or more)."""
    graph = {m.name: sorted(m.imports) for m in modules}
    reach = {name: reachable(graph, name) for name in graph}
    cycles, seen = [], set()
    for name in graph:
        if name not in seen and name in reach[name]:
            group = sorted(other for other in reach[name] if name in reach.get(other, ()))
            seen.update(group)
            cycles.append(group)
    return cycles


def reachable(graph: dict[str, list[str]], start: str) -> set[str]:
    """Everything that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph.get(name, ()))
    return found


# Contracts


def broken_imports(modules: list[Module], root: Path = ROOT) -> list[tuple[str, str, str]]:
    """Lists (contract, importer, imported) for direct imports that a contract of pyproject.toml forbids.

    Indirect imports are left to `lint-imports`.
    """
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    edges = [(m.name, i) for m in modules for i in sorted(m.imports) if m.name.startswith(PACKAGES)]
    broken = []
    for contract in settings["contracts"]:
        forbidden = is_upward if contract["type"] == "layers" else is_forbidden
        ignored = [tuple(rule.split(" -> ")) for rule in contract.get("ignore_imports", ())]
        for importer, imported in edges:
            allowed = any(matches(importer, a) and matches(imported, b) for a, b in ignored)
            if not allowed and forbidden(contract, importer, imported):
                broken.append((contract["id"], importer, imported))
    return broken


def matches(name: str, pattern: str) -> bool:
    """Compares as import-linter does: `*` stands for one part of a dotted name, `**` for any number of them."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**", "*"))
    return name.count(".") == pattern.count(".") and fnmatch.fnmatchcase(name, pattern)


def is_upward(contract: dict, importer: str, imported: str) -> bool:
    """Tells whether an import goes to a higher layer, or sideways between independent ones (`|`)."""
    places = [place(contract, name) for name in (importer, imported)]
    if None in places:
        return False
    (high, one, _), (low, other, independent) = places
    return low < high or (low == high and one != other and independent)


def place(contract: dict, name: str) -> tuple[int, str, bool] | None:
    """Finds a module's layer: its number from the top, its own name there, whether its neighbors are independent."""
    for container, (number, line) in itertools.product(contract["containers"], enumerate(contract["layers"])):
        for layer in line.replace("|", ":").split(":"):
            layer = layer.strip(" ()")
            if is_in(name, f"{container}.{layer}"):
                return number, layer, "|" in line
    return None


def is_forbidden(contract: dict, importer: str, imported: str) -> bool:
    """Tells whether a forbidden contract names both ends of an import."""
    source = any(is_in(importer, s) for s in contract["source_modules"])
    return source and any(is_in(imported, f) for f in contract["forbidden_modules"])


def is_in(name: str, package: str) -> bool:
    """Tells whether `name` is `package` or lies in it."""
    return name == package or name.startswith(package + ".")


if __name__ == "__main__":
    main()
