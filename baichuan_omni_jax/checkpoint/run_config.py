"""Which run a workdir belongs to: `run_config.json`, and the refusal of any other."""

import json
from fnmatch import fnmatch
from typing import Any

from etils import epath

from baichuan_omni_jax.config import RunConfig, from_dict, to_dict
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import write_json

RUN_CONFIG = "run_config.json"
# A run may be made longer, saved at other steps, and moved to other machines; the rest decides what it computes.
MAY_DIFFER = ("train.steps", "checkpoint.*", "eval.*", "mesh.*", "data.workers", "data.root", "data.trusted_roots*")
_ABSENT = "absent"


def check_run_config(workdir: epath.Path, run: RunConfig) -> None:
    """Raises ConfigError, naming the first key that differs, when `workdir` holds another run. A new one passes."""
    path = workdir / RUN_CONFIG
    if not path.exists():
        return
    try:
        # Through RunConfig, so that a field added since has its default.
        stored = flatten(to_dict(from_dict(RunConfig, json.loads(path.read_text()))))
    except ValueError as error:
        raise ConfigError(f"{path} is not a run config: {error}") from error
    given = flatten(to_dict(run))
    for key in [*given, *(key for key in stored if key not in given)]:
        old, new = stored.get(key, _ABSENT), given.get(key, _ABSENT)
        if old != new and not any(fnmatch(key, pattern) for pattern in MAY_DIFFER):
            raise ConfigError(
                f"workdir {workdir} belongs to another run: {key} is {old!r} there and {new!r} here "
                f"(only {', '.join(MAY_DIFFER)} may differ)"
            )


def store_run_config(workdir: epath.Path, run: RunConfig) -> None:
    """Writes `run_config.json` at once or not at all."""
    write_json(workdir / RUN_CONFIG, to_dict(run))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict by dotted path: {"train": {"steps": 3}} -> {"train.steps": 3}."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {key: leaf for name, item in value.items() for key, leaf in flatten(item, f"{prefix}{name}.").items()}
