"""The rows every benchmark prints: one JSON object a line, or a table."""

import json

from rich.console import Console
from rich.table import Table


def row(
    name: str,
    value: float,
    unit: str,
    *,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    goal: str | None = None,
    ok: bool | None = None,
    note: str = "",
) -> dict:
    """One measurement: `goal` is the comparison that `ok` evaluates, None where nothing is asked of it."""
    numbers = {"value": value, "peer_value": peer_value, "ratio": ratio}
    numbers = {key: float(f"{number:.4g}") if isinstance(number, float) else number for key, number in numbers.items()}
    return {
        "name": name,
        "value": numbers["value"],
        "unit": unit,
        "peer": peer,
        "peer_value": numbers["peer_value"],
        "ratio": numbers["ratio"],
        "goal": goal,
        "ok": None if ok is None else bool(ok),
        "note": note,
    }


def emit(rows: list[dict], as_json: bool) -> int:
    """Prints the rows and returns the script's exit code: 1 when an `ok` is false."""
    if as_json:
        print("\n".join(json.dumps(line) for line in rows))
    else:
        table = Table("name", "value", "peer", "ratio", "goal", "ok", "note")
        for line in rows:
            peer = "" if line["peer"] is None else f"{line['peer']} {line['peer_value'] or ''}".strip()
            cells = (line["name"], f"{line['value']:,} {line['unit']}", peer, line["ratio"], line["goal"], line["ok"])
            table.add_row(*("" if cell is None else str(cell) for cell in cells), line["note"])
        Console().print(table)
    return int(any(line["ok"] is False for line in rows))
