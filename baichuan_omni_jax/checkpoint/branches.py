"""Checkpoints of branches: any subset of a model's branches in one folder, and how `--checkpoint` finds them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from baichuan_omni_jax.branches import BRANCHES, MODEL_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint.arrays import DamagedError
from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS, OPT_STATE, check_files
from baichuan_omni_jax.checkpoint.steps import (
    TEMPORARY,
    committed_steps,
    newest_good,
    read_alike,
    read_newest,
    remove_unfinished,
    remove_unfinished_steps,
    step_folder,
)
from baichuan_omni_jax.checkpoint.trees import FolderSave, leaves_by_name, make_checkpointer, read_tree, stored_names
from baichuan_omni_jax.config import OmniConfig, to_hf
from baichuan_omni_jax.config.vocoder import VocoderConfig
from baichuan_omni_jax.errors import ConfigError, list_some
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.storage import is_url, parse_path, renames_folders

# Files of a checkpoint. A converted one also has `SOURCE`, what is remembered of the released model's own files.
BRANCHES_FILE, CONFIG, VOCODER_CONFIG, PROCESSOR = "branches.json", "config.json", "vocoder_config.json", "processor"
SOURCE = "source.json"
RANDOM = "random"  # in place of a folder: the branch starts from random weights
KEPT = "audio_tokenizer"  # of a workdir: the checkpoint of what made the run's code frames
_ORBAX_MARK = "_CHECKPOINT_METADATA"  # what Orbax writes first into every folder that it is to fill


@dataclass(frozen=True, kw_only=True)
class BranchInfo:
    """A line of `branches.json`."""

    parameters: int  # values of all its tensors
    dtype: str  # several are joined by +
    trained: int  # optimizer steps; 0 for random weights


def save_branches(
    path: epath.PathLike,
    branches: Mapping[str, Any],
    config: OmniConfig,
    tokenizer_json: str = "",
    *,
    trained: Mapping[str, int] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all, and returns when it is there.

    Args:
        path: the folder to write, which is not there, or empty.
        branches: name -> module.
        config: the model's sizes.
        tokenizer_json: the text of a tokenizer.json or a path to one; "": none.
        trained: branch -> optimizer steps (default 0).
        texts: further files, name -> contents.

    Raises:
        ConfigError: `path` exists and is not an empty folder.
    """
    path = parse_path(path)
    # Never over another checkpoint: whoever wants it gone removes it.
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} already exists and is not empty; nothing was written")
    checkpointer = make_checkpointer(_can_rename_beside(path))
    trees = {branch_folder(name): stored_names(module) for name, module in branches.items()}
    texts = checkpoint_texts(branches, config, tokenizer_json, trained or {}) | dict(texts or {})
    try:
        checkpointer.save(path, args=FolderSave(trees, texts), force=True)
        checkpointer.wait_until_finished()
    finally:
        checkpointer.close()


def load_branches(spec: str, abstract: Mapping[str, Any], *, allow_missing: bool = False) -> dict[str, Any]:
    """Reads branches of checkpoints.

    Args:
        spec: `DIR` or `branch=DIR,branch=DIR`. DIR is a checkpoint, a step of a workdir, or a workdir, which means its
            newest good step and the audio tokenizer that it keeps; `branch=random` leaves that branch out.
        abstract: the branches to read, name -> abstract module (see `with_shardings`).
        allow_missing: leaves out a branch that is nowhere.

    Returns:
        Name -> module, with the dtypes and shardings of `abstract`.

    Raises:
        ConfigError: names branch and folder: a branch is nowhere, a file is damaged, a tensor is missing, superfluous
            or of another shape.
    """
    sources, loaded = parse_spec(spec, tuple(abstract)), {}
    # Each folder is found once, however many branches it gives.
    for given in dict.fromkeys(sources.get(name, "") for name in abstract):
        wanted = {name: module for name, module in abstract.items() if sources.get(name, "") == given}
        if given and given != RANDOM:
            loaded |= _read_branches(given, wanted, allow_missing)
        elif not given and not allow_missing:
            raise ConfigError(f"checkpoint {spec!r} names no branch {next(iter(wanted))}")
    return {name: loaded[name] for name in abstract if name in loaded}


def _read_branches(given: str, wanted: Mapping[str, Any], allow_missing: bool) -> dict[str, Any]:
    """Reads branches of one checkpoint, or of the newest step of a workdir that is whole on all hosts."""

    def read(folder: epath.Path) -> dict[str, Any]:
        homes = {name: branch_home(folder, name) for name in wanted}
        lacking = [name for name, home in homes.items() if home is None]
        if lacking and not allow_missing:
            raise ConfigError(f"checkpoint {folder} has no branch {lacking[0]}; it has {_listed(folder)}")
        return {
            name: read_tree(home / branch_folder(name), wanted[name], f"branch {name}")
            for name, home in homes.items()
            if home is not None
        }

    path = parse_path(given)
    if (path / BRANCHES_FILE).exists() or not (path / "checkpoints").is_dir():
        # One host looks at the files, and each finds what is wrong with the chunks that it reads: all leave together.
        branches, bad = read_alike(lambda: read(find_checkpoint(path)))
        if branches is None or bad:
            raise ConfigError(bad)
        return branches
    found, bad = read_newest(path, committed_steps(path), lambda step: read(step_folder(path, step)), (OPT_STATE,))
    if found is None:
        raise ConfigError(_unusable(path, bad))
    return found[1]


def parse_spec(spec: str, branches: Sequence[str]) -> dict[str, str]:
    """Parses to branch -> folder a `DIR` (every branch) or `branch=DIR,...` (those named). Raises ConfigError.

    >>> parse_spec("llm=a,vision=b", ("llm", "vision", "audio_head"))
    {'llm': 'a', 'vision': 'b'}
    """
    parts = [part.strip() for part in spec.split(",")]
    # One folder for every branch.
    if "=" not in spec:
        return dict.fromkeys(branches, spec)
    sources = {}
    for part in parts:
        name, equals, folder = part.partition("=")
        if not equals or not folder:
            raise ConfigError(f"checkpoint {spec!r} is neither DIR nor branch=DIR,...: {part!r}")
        if name not in branches:
            raise ConfigError(f"checkpoint {spec!r} names branch {name!r}; this model has {', '.join(branches)}")
        if name in sources:
            raise ConfigError(f"checkpoint {spec!r} names branch {name!r} twice")
        sources[name] = folder
    return sources


def find_checkpoint(path: epath.PathLike) -> epath.Path:
    """Finds the checkpoint meant by `path`: itself, or the newest step of a workdir whose files seem whole.

    What arrays hold is checked when they are read (`read_tree`). Raises ConfigError when there is none or a file is
    damaged; a workdir's damaged steps are passed over, with a warning.
    """
    path = parse_path(path)
    if (path / BRANCHES_FILE).exists():
        if not is_finished(path):
            raise ConfigError(f"checkpoint {path} was never finished: it has no {CHECKSUMS}")
        # Converted ones of old versions have no checksums; others' take a reading of every file, by one host.
        looks = jax.process_index() == 0 and (path / CHECKSUMS).exists()
        if bad := check_files(path, skip=(OPT_STATE,)) if looks else None:
            raise DamagedError(f"checkpoint {path} is damaged: {bad} is missing or changed")
        return path
    if not (path / "checkpoints").is_dir():
        # The folder of a recipe or of stages is what one has at hand.
        inside = sorted(run.parent.name for run in path.glob("*/checkpoints")) if path.is_dir() else []
        if inside:
            raise ConfigError(f"{path} is the folder of several runs: name one of them ({list_some(inside)})")
        raise ConfigError(f"{path} is neither a checkpoint ({BRANCHES_FILE}) nor a workdir (checkpoints/)")
    # A workdir: its newest step whose files are whole.
    step, bad = newest_good(path, committed_steps(path), skip=(OPT_STATE,))
    if step is None:
        raise ConfigError(_unusable(path, bad))
    return step_folder(path, step)


def _unusable(workdir: epath.Path, bad: str) -> str:
    return f"workdir {workdir} has no usable checkpoint" + (f": {bad}" if bad else "")


def is_finished(folder: epath.Path) -> bool:
    """Whether a checkpoint that is there was written to its end.

    One that appeared by a rename always was; where folders are not renamed, the checksums come last.
    """
    return (folder / CHECKSUMS).exists() or not (folder / _ORBAX_MARK).exists()


def remove_leftovers(workdir: epath.Path) -> bool:
    """Removes what was left half-written of a workdir's steps and of the tokenizer to keep.

    Returns whether there was any.
    """
    found = remove_unfinished_steps(workdir)
    kept = workdir / KEPT
    unfinished = [kept] if kept.exists() and not is_finished(kept) else []
    # A bucket has no temporary names.
    if not is_url(workdir):
        unfinished += workdir.glob(f"{KEPT}{TEMPORARY}*")
    for path in unfinished:
        remove_unfinished(path)
    return found or bool(unfinished)


def _can_rename_beside(path: epath.Path) -> bool:
    """Whether a folder can be renamed to `path`: tried in the folder above, which is made."""
    if is_url(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    return renames_folders(path.parent)


def read_branch_info(folder: epath.PathLike) -> dict[str, BranchInfo]:
    """Reads `branches.json` of a checkpoint folder. Raises ConfigError when it cannot be read."""
    path = epath.Path(folder) / BRANCHES_FILE
    try:
        return {name: BranchInfo(**line) for name, line in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def branch_home(folder: epath.PathLike, name: str) -> epath.Path | None:
    """Returns the checkpoint that holds branch `name` of `folder`; None: there is no such branch.

    It is the folder itself or, for a step of a workdir, what that keeps as the tokenizer of its code frames. Raises
    ConfigError when the kept one is damaged.
    """
    folder = epath.Path(folder)
    if (folder / branch_folder(name)).exists():
        return folder
    # DIR/checkpoints/STEP -> DIR/audio_tokenizer
    kept = folder.parent.parent / KEPT
    in_workdir = folder.parent.name == "checkpoints"
    return find_checkpoint(kept) if in_workdir and (kept / branch_folder(name)).exists() else None


def branch_folder(name: str) -> str:
    """Returns where a branch lies in a checkpoint."""
    return f"params/{name}"


def checkpoint_texts(
    branches: Mapping[str, Any], config: OmniConfig, tokenizer_json: str, trained: Mapping[str, int]
) -> dict[str, str]:
    """Returns the text files of a checkpoint, by relative name."""
    info = {}
    for name, module in branches.items():
        leaves = leaves_by_name(module).values()
        count = sum(int(leaf.size) for leaf in leaves)
        dtype = "+".join(sorted({str(np.dtype(leaf.dtype)) for leaf in leaves}))
        info[name] = asdict(BranchInfo(parameters=count, dtype=dtype, trained=trained.get(name, 0)))
    texts = {
        CONFIG: json.dumps(to_hf(config), indent=2, ensure_ascii=False),
        BRANCHES_FILE: json.dumps(info, indent=2),
    }
    if tokenizer_json:
        texts[f"{PROCESSOR}/tokenizer.json"] = _tokenizer_text(tokenizer_json)
    return texts


def _tokenizer_text(tokenizer_json: str) -> str:
    # A path never begins with a brace.
    if tokenizer_json.lstrip().startswith("{"):
        return tokenizer_json
    try:
        return parse_path(tokenizer_json).read_text()
    except OSError as error:
        raise ConfigError(f"tokenizer {tokenizer_json} cannot be read: {error}") from error


def _listed(folder: epath.Path) -> str:
    """Lists the branches of a checkpoint for a message."""
    params = folder / "params"
    return (", ".join(sorted(path.name for path in params.iterdir())) if params.exists() else "") or "none"


def abstract_branches(
    cfg: OmniConfig,
    vocoder: VocoderConfig | None = None,
    *,
    only: Iterable[str] = (),
    compute: ComputePolicy | None = None,
) -> dict[str, nnx.Module]:
    """Returns modules with shapes for values (`jax.eval_shape`): what checkpoints and conversion are checked against.

    Args:
        cfg: the model's sizes.
        vocoder: the vocoder's sizes.
        only: the branches wanted; by default those of the released files, the vocoder among them if it has sizes.
        compute: how modules compute (default: `ComputePolicy()`).

    Returns:
        Branch -> module on the mesh in use, which is part of every array's type.
    """
    names = tuple(only) or (*MODEL_BRANCHES, *([VOCODER_BRANCH] if vocoder else []))
    # Kept for each mesh: tracing the constructors of all branches takes seconds.
    mesh = jax.sharding.get_mesh()
    return {name: _abstract(name, cfg, vocoder, compute or ComputePolicy(), mesh) for name in names}


@cache
def _abstract(
    name: str, cfg: OmniConfig, vocoder: VocoderConfig | None, compute: ComputePolicy, mesh: jax.sharding.Mesh
) -> nnx.Module:
    return jax.eval_shape(lambda key: BRANCHES[name].build(key, cfg, compute, vocoder), jax.random.key(0))
