"""Writes the API reference: a page a package, read from the sources alone, so that nothing is imported.

Docstrings are Markdown with Google's sections (`Args:`, `Returns:`, `Raises:`), which become lists. Public modules,
classes, methods and functions are listed where they have a docstring.
"""

import ast
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("baichuan_omni_jax", "data_pipelines")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension: pages are written before Sphinx lists its sources."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "reference" / "api"))
    return {"parallel_read_safe": True}


def write_pages(target: Path) -> None:
    """Writes a page for each package and an index; files whose text did not change are left alone."""
    pages = {name: page for package in PACKAGES for name, page in package_pages(package)}
    toc = "\n".join(pages)
    pages["index"] = f"# API\n\nRead from the sources.\n\n```{{toctree}}\n:maxdepth: 1\n\n{toc}\n```\n"
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = target / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def package_pages(package: str) -> list[tuple[str, str]]:
    """Makes the pages of one package: one for each folder that holds modules."""
    pages = []
    for folder in [ROOT / package, *sorted(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
        files = sorted(folder.glob("*.py"), key=lambda p: (p.name != "__init__.py", p.name))
        name = ".".join(folder.relative_to(ROOT).parts)
        sections = [section for file in files if (section := module_section(file))]
        if sections:
            pages.append((name, f"# `{name}`\n\n" + "\n".join(sections)))
    return pages


def module_section(file: Path) -> str:
    """Renders one module: its docstring, then its public classes and functions in the order of the source."""
    if file.stem.startswith("_") and file.stem != "__init__":
        return ""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = file.relative_to(ROOT).with_suffix("").parts
    package = parts[-1] == "__init__"
    name = ".".join(parts[:-1] if package else parts)
    lines = [] if package else [f"## `{parts[-1]}`", ""]
    lines += [f"```{{py:module}} {name}", "```", "", to_markdown(ast.get_docstring(tree) or ""), ""]
    for node in tree.body:
        lines += definition(node, "")
    return "\n".join(lines)


def definition(node: ast.AST, owner: str) -> list[str]:
    """Renders a class or function as a directive, methods inside their class's; nothing for what is private."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return []
    docstring = ast.get_docstring(node)
    if docstring is None:
        return []
    if isinstance(node, ast.ClassDef):
        kind, signature = "class", node.name
        inner = [line for child in node.body for line in definition(child, node.name)]
    else:
        kind = "method" if owner else "function"
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature, inner = f"{node.name}({arguments(node.args, bool(owner))}){returns}", []
    # A directive's fence is longer than every fence in it.
    fence = ":" * (6 if isinstance(node, ast.ClassDef) else 4)
    return [f"{fence}{{py:{kind}}} {signature}", "", to_markdown(docstring), "", *inner, fence, ""]


def arguments(args: ast.arguments, method: bool) -> str:
    """Unparses a signature's arguments, without `self`."""
    text = ast.unparse(args)
    return re.sub(r"^(self|cls)(, )?", "", text) if method else text


def to_markdown(text: str) -> str:
    """Turns Google's sections into bold words with lists and fences examples; all else stays as it is.

    >>> print(to_markdown("Adds.\\n\\nArgs:\\n    a: one\\n        number\\n    b: another"))
    Adds.
    <BLANKLINE>
    **Args**
    <BLANKLINE>
    - `a`: one number
    - `b`: another
    <BLANKLINE>
    """
    out: list[str] = []
    lines = text.split("\n")
    while lines:
        if lines[0].startswith(">>> "):
            # An example is code up to the next empty line; as text, its brackets would be links.
            end = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
            out += ["```python", *lines[:end], "```"]
            lines = lines[end:]
            continue
        heading = re.fullmatch(r"(\w+):\s*", lines[0])
        if not heading or heading[1] not in SECTIONS:
            # Headings inside a docstring would end the page's section.
            out.append(re.sub(r"^#+ (.*)", r"**\1**", lines.pop(0)))
            continue
        lines.pop(0)
        body = []
        while lines and (not lines[0].strip() or lines[0].startswith("    ")):
            body.append(lines.pop(0)[4:])
        out += ["", f"**{heading[1]}**", "", *section_items(body), ""]
    return "\n".join(out).replace("\n\n\n", "\n\n")


def section_items(body: list[str]) -> list[str]:
    """Makes a list item of each `name: text` and leaves lines without names as they are."""
    items: list[str] = []
    for line in body:
        named = re.match(r"`?(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*)`?(?: \([^)]*\))?: (.*)", line)
        if named:
            items.append(f"- `{named[1]}`: {named[2]}")
        elif line.startswith(" ") and items and items[-1].startswith("- "):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    return items
