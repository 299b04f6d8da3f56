"""`DIR/starts.json`: every start of a run, from which step, on how many hosts and devices, and what had changed.

    {"run": "3f9c...", "starts": [{"time": "...", "step": 0, "hosts": 2, "devices": 8, "changed": {}}, ...]}

`changed` maps keys of the configuration, `hosts` and `devices` to what they were at the start before and what they are.
`run` is drawn once: it tells this run from one that was in the same place before.
"""

import json
import secrets
from datetime import UTC, datetime
from typing import Any

import jax
from etils import epath

from baichuan_omni_jax.storage import write_json

STARTS = "starts.json"


def note_start(workdir: epath.Path, step: int, changed: dict[str, list[Any]]) -> str:
    """Adds this start to the record, on the host that writes it.

    Args:
        workdir: whose record it is; makes a new one where there is none.
        step: where the run goes on.
        changed: key of the configuration -> its value at the start before, and now.

    Returns:
        What has changed, machines too: "data.rows 16 -> 32, hosts 2 -> 1"; "" where nothing has.
    """
    record = _read(workdir)
    machines = {"hosts": jax.process_count(), "devices": jax.device_count()}
    before = record["starts"][-1] if record["starts"] else machines
    moved = {name: [before.get(name), count] for name, count in machines.items() if before.get(name) != count}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record["starts"].append({"time": now, "step": step, **machines, "changed": changed | moved})
    write_json(workdir / STARTS, record)
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in (changed | moved).items())


def run_identity(workdir: epath.Path) -> str:
    """Returns what tells this run from others in the same place; "" where it is not known."""
    return _read(workdir)["run"] if (workdir / STARTS).exists() else ""


def _read(workdir: epath.Path) -> dict[str, Any]:
    """Reads the record; a new one where there is none, or none that can be read: no run fails for it."""
    try:
        record = json.loads((workdir / STARTS).read_text())
        if isinstance(record["run"], str) and all(isinstance(start, dict) for start in record["starts"]):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"run": secrets.token_hex(8), "starts": []}
