"""Where a run's first weights came from: `parent.json` of a workdir, written once, when the workdir is new."""

import json
from dataclasses import asdict, dataclass, field, replace

import jax
from etils import epath

from baichuan_omni_jax.checkpoint.branches import BRANCHES_FILE, RANDOM, branch_home, parse_spec, read_branch_info
from baichuan_omni_jax.checkpoint.run_config import RUN_CONFIG
from baichuan_omni_jax.checkpoint.steps import committed_steps, step_folder
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import write_json

PARENT = "parent.json"


@dataclass(frozen=True)
class Parent:
    """`checkpoints`: branch -> checkpoint folder it was read from; `runs`: such a folder's run, by its name; `trained`:
    branch -> steps it had been trained for. All empty for a run that started from random weights.
    """

    checkpoints: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)


def find_parent(workdir: epath.PathLike, init_from: str, branches: tuple[str, ...]) -> Parent:
    """What `parent.json` of the workdir says, or for a new workdir what `init_from` stands for now.

    Raises ConfigError when the file cannot be read, or `init_from` names a folder without a checkpoint.
    """
    path = epath.Path(workdir) / PARENT
    if not path.exists():
        return _resolve(init_from, branches)
    try:
        return Parent(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def record_parent(workdir: epath.PathLike, parent: Parent) -> None:
    """Writes `parent.json`, whole or not at all; one that is there stays."""
    path = epath.Path(workdir) / PARENT
    if jax.process_index() or path.exists():
        return
    write_json(path, asdict(parent))


def stored_tokenizer(path: epath.PathLike) -> epath.Path | None:
    """The `tokenizer.json` of a checkpoint or of a workdir's newest step; None when there is none."""
    folder = newest_checkpoint(path)
    tokenizer = folder / "processor" / "tokenizer.json" if folder else None
    return tokenizer if tokenizer is not None and tokenizer.exists() else None


def initial_tokenizer(init_from: str, branches: tuple[str, ...]) -> epath.Path | None:
    """The tokenizer that the language model's first weights were trained with, where `init_from` brings one."""
    source = parse_spec(init_from, branches).get("llm") if init_from else None
    return stored_tokenizer(source) if source and source != RANDOM else None


def with_text_tokenizer(run: RunConfig, workdir: epath.PathLike | None = None) -> RunConfig:
    """The run with the text tokenizer of its weights where `data.tokenizer` names none: its workdir's, then that of
    `checkpoint.init_from`.
    """
    if run.data.tokenizer:
        return run
    stored = None if workdir is None else stored_tokenizer(workdir)
    own = stored or initial_tokenizer(run.checkpoint.init_from, run.branches) or ""
    return replace(run, data=replace(run.data, tokenizer=str(own)))


def parent_data_state(parent: Parent) -> dict:
    """The data's state of the run that gave the language model its first weights. Raises ConfigError: there is none."""
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
        folder = branch_home(folder, branch) or folder
        parent.checkpoints[branch] = str(folder)
        info = read_branch_info(folder).get(branch)
        parent.trained[branch] = info.trained if info else 0
        workdirs = (folder.parent, folder.parent.parent)  # of a kept tokenizer, of a step
        run_config = next((path / RUN_CONFIG for path in workdirs if (path / RUN_CONFIG).exists()), None)
        if run_config is not None:
            parent.runs[str(folder)] = json.loads(run_config.read_text())["name"]
    return parent


def newest_checkpoint(path: epath.PathLike) -> epath.Path | None:
    """Returns the checkpoint meant by `path`: itself, or a workdir's newest step; None: neither. Verifies nothing."""
    path = epath.Path(path).expanduser().resolve()
    if (path / BRANCHES_FILE).exists():
        return path
    steps = committed_steps(path)
    return step_folder(path, steps[-1]) if steps else None
