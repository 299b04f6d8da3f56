"""Where a workdir's run comes from: its configuration, the checkpoints it started from, its audio tokenizer.

    DIR/run_config.json           the run that owns the workdir; any other is refused
    DIR/parent.json               the checkpoints of its first weights, written once, when the workdir is new
    DIR/starts.json               every start: from which step, on how many hosts and devices, what had changed
    DIR/audio_tokenizer/          a checkpoint with the branch audio_encoder, and origin.json: where it came from

The audio tokenizer is what made the run's code frames: codes mean nothing without it. It is
kept once, when the run begins, whichever tokenizer it is (a seeded random one too), and `DIR/checkpoints/STEP/` finds
it there as if it were one of its own branches.
"""

import json
import secrets
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Any

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.branches import (
    BRANCHES_FILE,
    KEPT,
    RANDOM,
    branch_home,
    find_checkpoint,
    is_finished,
    parse_spec,
    read_branch_info,
    save_branches,
)
from baichuan_omni_jax.checkpoint.steps import committed_steps, step_folder
from baichuan_omni_jax.config import OmniConfig, RunConfig, from_dict, to_dict
from baichuan_omni_jax.errors import ConfigError, RunStoppedError, storage_error
from baichuan_omni_jax.storage import parse_path, read_json_object, write_json

RUN_CONFIG, PARENT, _ORIGIN = "run_config.json", "parent.json", "origin.json"
# {"run": "3f9c...", "starts": [{"time": "...", "step": 0, "hosts": 2, "devices": 8, "changed": {}}, ...]}; `changed`
# maps what differs to what it was at the start before and what it is. `run` is drawn once: it tells this run from one
# that was in the same place before.
STARTS = "starts.json"
# A run may be made longer, saved at other steps, and moved to other machines, with as many rows a step as these bear;
# the rest decides what it computes.
MAY_DIFFER = (
    *("train.steps", "train.accumulate", "checkpoint.*", "eval.*", "machine", "mesh.*", "watch.*"),
    *("data.rows", "data.workers", "data.root", "data.trusted_roots*", "data.patience", "data.cache*"),
    *("data.max_unprepared_mb", "compute.attention_block", "compute.attention_q_block", "compute.attention_kv_block"),
)
_ABSENT = "absent"
TOKENIZER_BRANCH = "audio_encoder"
_CODED = "audio_head"  # the branch whose tables and heads belong to the codes


def check_run_config(workdir: epath.Path, run: RunConfig) -> dict[str, list[Any]]:
    """Raises ConfigError, naming the first key that differs, when `workdir` holds another run. A new one passes.

    Returns the keys that differ and may, with both values.
    """
    path = workdir / RUN_CONFIG
    if not path.exists():
        return {}
    values = read_json_object(path)
    try:
        # Through RunConfig, so that a field added since has its default.
        stored = flatten(to_dict(from_dict(RunConfig, values)))
    except (ConfigError, TypeError) as error:  # a field that has no default may be missing
        raise ConfigError(f"{path} is not a run config: {error}") from error
    given, changed = flatten(to_dict(run)), {}
    # Keys of both sides: a longer mixture or one more group has keys that the other lacks.
    for key in [*given, *(key for key in stored if key not in given)]:
        old, new = stored.get(key, _ABSENT), given.get(key, _ABSENT)
        if old == new:
            continue
        if not any(fnmatch(key, pattern) for pattern in MAY_DIFFER):
            raise ConfigError(
                f"workdir {workdir} belongs to another run: {key} is {old!r} there and {new!r} here "
                f"(only {', '.join(MAY_DIFFER)} may differ)"
            )
        changed[key] = [old, new]
    return changed


def store_run_config(workdir: epath.Path, run: RunConfig) -> None:
    """Writes `run_config.json`, whole or not at all."""
    write_json(workdir / RUN_CONFIG, to_dict(run))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turns nested dicts and lists into one dict by dotted path: {"train": {"steps": 3}} -> {"train.steps": 3}."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix[:-1]: value}
    return {key: leaf for name, item in value.items() for key, leaf in flatten(item, f"{prefix}{name}.").items()}


@dataclass(frozen=True)
class Parent:
    """Where a run's first weights came from. All empty for a run that started from random weights.

    A checkpoint that was put together from public models has one too: their folders by branch, and what is random.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)  # branch -> the checkpoint folder it was read from
    runs: dict[str, str] = field(default_factory=dict)  # such a folder -> the name of the run that wrote it
    trained: dict[str, int] = field(default_factory=dict)  # branch -> steps that it had been trained for
    random: list[str] = field(default_factory=list)  # of a checkpoint from parts: (parts of) branches that none gave


def find_parent(workdir: epath.PathLike, init_from: str, branches: tuple[str, ...]) -> Parent:
    """Reads `parent.json` of the workdir, or for a new workdir resolves what `init_from` stands for now.

    Raises ConfigError when the file cannot be read, or `init_from` names a folder without a checkpoint.
    """
    path = epath.Path(workdir) / PARENT
    if not path.exists():
        return _resolve(init_from, branches)
    try:
        parent = Parent(**read_json_object(path))
        odd = [name for name in ("checkpoints", "runs", "trained") if not isinstance(getattr(parent, name), dict)]
        # Steps are counted on from these.
        odd += [f"trained.{name}" for name, steps in parent.trained.items() if not isinstance(steps, int)]
        if odd:
            raise TypeError(f"{odd[0]} has another form")
        return parent
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def record_parent(workdir: epath.PathLike, parent: Parent) -> None:
    """Writes `parent.json`, whole or not at all; one that is there stays."""
    path = epath.Path(workdir) / PARENT
    # A resumed run keeps the parent it began with, whatever `init_from` stands for by now.
    if jax.process_index() or path.exists():
        return
    write_json(path, asdict(parent))


def stored_tokenizer(path: epath.PathLike) -> epath.Path | None:
    """Finds the `tokenizer.json` of a checkpoint or of a workdir's newest step; None when there is none."""
    folder = newest_checkpoint(path)
    tokenizer = folder / "processor" / "tokenizer.json" if folder else None
    return tokenizer if tokenizer is not None and tokenizer.exists() else None


def initial_tokenizer(init_from: str, branches: tuple[str, ...]) -> epath.Path | None:
    """Finds the tokenizer that a run's first weights were trained with, where `init_from` brings one.

    That is the language model's, or in a run without one that of any other branch: the model's ids are of it as well.
    """
    sources = parse_spec(init_from, branches) if init_from else {}
    readers = ("llm",) if "llm" in branches else branches
    given = (sources[branch] for branch in readers if sources.get(branch, RANDOM) != RANDOM)
    return next(filter(None, map(stored_tokenizer, given)), None)


def with_text_tokenizer(run: RunConfig, workdir: epath.PathLike | None = None) -> RunConfig:
    """Returns the run with the text tokenizer of its weights, where `data.tokenizer` names none.

    That is its workdir's, else that of `checkpoint.init_from`.
    """
    if run.data.tokenizer:
        return run
    stored = None if workdir is None else stored_tokenizer(workdir)
    own = stored or initial_tokenizer(run.checkpoint.init_from, run.branches) or ""
    return replace(run, data=replace(run.data, tokenizer=str(own)))


def parent_data_state(parent: Parent) -> dict:
    """Reads the data's state of the run that gave the language model its first weights.

    Raises ConfigError where there is none.
    """
    folder = parent.checkpoints.get("llm", "")
    path = epath.Path(folder) / "data.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.continue_sources needs the workdir of a run in checkpoint.init_from: {path} cannot be read: {error}"
        ) from error


def _resolve(init_from: str, branches: tuple[str, ...]) -> Parent:
    parent = Parent()
    for branch, given in (parse_spec(init_from, branches) if init_from else {}).items():
        if given == RANDOM:
            continue
        folder = newest_checkpoint(given)
        if folder is None:
            raise ConfigError(f"{given} is neither a checkpoint ({BRANCHES_FILE}) nor a workdir with one")
        # A step of a workdir gives the audio tokenizer that the workdir keeps.
        folder = branch_home(folder, branch) or folder
        parent.checkpoints[branch] = str(folder)
        # What a reader of the workdir wants to know: whose weights these were, and how long they had been trained.
        info = read_branch_info(folder).get(branch)
        parent.trained[branch] = info.trained if info else 0
        workdirs = (folder.parent, folder.parent.parent)  # of a kept tokenizer, of a step
        run_config = next((path / RUN_CONFIG for path in workdirs if (path / RUN_CONFIG).exists()), None)
        if run_config is not None:
            parent.runs[str(folder)] = str(read_json_object(run_config).get("name", ""))
    return parent


def newest_checkpoint(path: epath.PathLike) -> epath.Path | None:
    """Returns the checkpoint meant by `path`: itself, or a workdir's newest step; None: neither. Verifies nothing.

    Raises ConfigError and StorageError where storage does not tell.
    """
    path = parse_path(path)
    try:
        if (path / BRANCHES_FILE).exists() and is_finished(path):
            return path
        steps = committed_steps(path)
    except OSError as error:
        raise storage_error(error, f"{path} cannot be read") from error
    return step_folder(path, steps[-1]) if steps else None


@dataclass(frozen=True)
class TokenizerOrigin:
    """Where an audio tokenizer came from."""

    checkpoint: str  # where it was read from; "": it was drawn from the run's seed
    untrained: bool  # whether it holds its first random weights


def find_tokenizer(run: RunConfig, workdir: epath.PathLike | None = None) -> epath.Path | None:
    """Returns the checkpoint with the audio tokenizer that a run's code frames are made by; None: the seeded one.

    That is what the run's workdir keeps, else `data.audio_tokenizer`, else the one that the codes of
    `checkpoint.init_from` were made by. Every host must call it. Raises ConfigError where there is none in
    `data.audio_tokenizer`, and for one that is damaged.
    """
    # First what this run has kept, then what the user names, then what the first weights' codes were made by.
    if workdir is not None and has_tokenizer(epath.Path(workdir)):
        return find_checkpoint(epath.Path(workdir) / KEPT)
    if run.data.audio_tokenizer:
        given = parse_spec(run.data.audio_tokenizer, (TOKENIZER_BRANCH,))[TOKENIZER_BRANCH]
        try:
            home = branch_home(find_checkpoint(given), TOKENIZER_BRANCH)
        except OSError as error:
            raise storage_error(error, f"data.audio_tokenizer {given} cannot be read") from error
        if home is None:
            raise ConfigError(f"data.audio_tokenizer {given} has no branch {TOKENIZER_BRANCH}")
        return home
    sources = parse_spec(run.checkpoint.init_from, run.branches) if run.checkpoint.init_from else {}
    given = sources.get(_CODED, RANDOM)
    folder = None if given == RANDOM else newest_checkpoint(given)
    home = None if folder is None else branch_home(folder, TOKENIZER_BRANCH)
    return None if home is None else find_checkpoint(home)


def has_tokenizer(workdir: epath.Path) -> bool:
    """Whether the workdir keeps an audio tokenizer; one that a killed run left half-written is none."""
    kept = workdir / KEPT
    return kept.exists() and is_finished(kept)


def keep_tokenizer(workdir: epath.PathLike, tokenizer: Any, config: OmniConfig, origin: TokenizerOrigin) -> None:
    """Writes `tokenizer` into the workdir, whole or not at all. Every host must call it, with the same values as numpy.

    Raises RunStoppedError when it cannot be written.
    """
    # A checkpoint like any other, with how long the branch had been trained where it came from.
    path, trained = epath.Path(workdir) / KEPT, 0
    if origin.checkpoint:
        info = read_branch_info(origin.checkpoint).get(TOKENIZER_BRANCH)
        trained = info.trained if info else 0
    texts = {_ORIGIN: json.dumps(asdict(origin), indent=1)}
    try:
        save_branches(path, {TOKENIZER_BRANCH: tokenizer}, config, trained={TOKENIZER_BRANCH: trained}, texts=texts)
    except OSError as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunStoppedError(f"saving the audio tokenizer in {path} failed: {reason}") from error


def read_origin(folder: epath.PathLike) -> TokenizerOrigin | None:
    """Returns where a kept tokenizer came from; None for any other checkpoint. Raises ConfigError."""
    path = epath.Path(folder) / _ORIGIN
    if not path.exists():
        return None
    try:
        return TokenizerOrigin(**read_json_object(path))
    except TypeError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def note_start(workdir: epath.Path, step: int, changed: dict[str, list[Any]]) -> str:
    """Adds this start to the record, on the host that writes it.

    Args:
        workdir: whose record it is; makes a new one where there is none.
        step: where the run goes on.
        changed: key of the configuration -> its value at the start before, and now.

    Returns:
        What has changed, machines too: "data.rows 16 -> 32, hosts 2 -> 1"; "" where nothing has.
    """
    record = _read_starts(workdir)
    machines = {"hosts": jax.process_count(), "devices": jax.device_count()}
    before = record["starts"][-1] if record["starts"] else machines
    moved = {name: [before.get(name), count] for name, count in machines.items() if before.get(name) != count}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record["starts"].append({"time": now, "step": step, **machines, "changed": changed | moved})
    write_json(workdir / STARTS, record)
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in (changed | moved).items())


def run_identity(workdir: epath.Path) -> str:
    """Returns what tells this run from others in the same place; "" where it is not known."""
    return _read_starts(workdir)["run"] if (workdir / STARTS).exists() else ""


def _read_starts(workdir: epath.Path) -> dict[str, Any]:
    """Reads the record; a new one where there is none, or none that can be read: no run fails for it."""
    try:
        record = json.loads((workdir / STARTS).read_text())
        if isinstance(record["run"], str) and all(isinstance(start, dict) for start in record["starts"]):
            return record
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {"run": secrets.token_hex(8), "starts": []}
