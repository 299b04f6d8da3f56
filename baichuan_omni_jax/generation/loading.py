"""Branches put together from checkpoints, ready to generate: `DIR`, or `branch=DIR,...` each from a run of its own."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from baichuan_omni_jax.branches import BRANCHES, CONVERTED_BRANCHES, SPEECH_BRANCHES, VOCODER_BRANCH
from baichuan_omni_jax.checkpoint import (
    abstract_branches,
    branch_home,
    find_checkpoint,
    read_branch_info,
    read_origin,
    read_tree,
    with_shardings,
)
from baichuan_omni_jax.checkpoint.branches import (
    BRANCHES_FILE,
    CONFIG,
    RANDOM,
    SOURCE,
    VOCODER_CONFIG,
    branch_folder,
    parse_spec,
)
from baichuan_omni_jax.checkpoint.provenance import PARENT, RUN_CONFIG
from baichuan_omni_jax.config import ImagesConfig, MeshConfig, OmniConfig, from_dict, read_hf
from baichuan_omni_jax.config.vocoder import read_vocoder_config
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.chat import ChatModel
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh


@dataclass(frozen=True)
class LoadedBranches:
    """Modules by branch, the architecture that they make together, and where the language model's tokenizer lies.

    `untrained` names the branches that hold the random weights they began with; `tokenizer` is None where the
    checkpoint brings none. `images` is how the run that trained the vision branch took stills (the default where the
    checkpoint is in no run's workdir).
    """

    branches: dict[str, nnx.Module]
    config: OmniConfig
    tokenizer: epath.Path | None
    untrained: tuple[str, ...]
    images: ImagesConfig = ImagesConfig()


def load_for_generation(
    spec: str,
    *,
    needed: Iterable[str] = ("llm",),
    only: Iterable[str] | None = None,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> LoadedBranches:
    """Every branch that `spec` has: `DIR` (a checkpoint or a workdir, whose newest good step counts), or by branch.

    What computes language (`llm`, `vision`, `audio_head`) comes in `dtype`; what encodes and decodes audio in fp32, as
    its codes must be those of training. `mesh` (default: one device) is what they are placed on. A vocoder lies beside
    `flow` unless it is named. `only` leaves all other branches where they are.

    Raises ConfigError: a branch of `needed`, or one named, that is nowhere; a damaged file; checkpoints whose
    audio codes are not the same.
    """
    folders = _folders(spec)
    if only is not None:
        wanted = set(only)
        folders = {name: folder for name, folder in folders.items() if name in wanted}
    if missing := [name for name in needed if name not in folders]:
        raise ConfigError(f"checkpoint {spec!r} has no branch {missing[0]}; it has {', '.join(folders) or 'none'}")
    # Before any array is read: checkpoints that do not fit are refused for the price of small files.
    cfg = _joined_config(folders)
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        branches = {name: _load(name, folder, cfg, mesh, dtype) for name, folder in folders.items()}
    tokenizer = folders["llm"] / "processor" / "tokenizer.json" if "llm" in folders else None
    untrained = tuple(name for name, folder in folders.items() if is_untrained(name, folder))
    tokenizer = tokenizer if tokenizer and tokenizer.exists() else None
    return LoadedBranches(branches, cfg, tokenizer, untrained, _trained_images(folders.get("vision")))


def make_chat_model(
    loaded: LoadedBranches,
    tokenizer: Tokenizer | None,
    *,
    slots: int = 8,
    length: int = 4096,
    cache_dtype: str | None = None,
    seed: int = 0,
) -> ChatModel:
    """Makes the engine and, where the branches for it are there, what decodes its speech.

    See `Engine` for the sizes of the cache; `seed` is that of the speech's noise.
    """
    engine = Engine(loaded.branches, loaded.config, tokenizer, slots=slots, length=length, cache_dtype=cache_dtype)
    speaks = all(name in loaded.branches for name in (*SPEECH_BRANCHES, "audio_head"))
    return ChatModel(
        engine, loaded.config, SpeechDecoder(loaded.branches, loaded.config, seed=seed) if speaks else None
    )


def _folders(spec: str) -> dict[str, epath.Path]:
    """Branch -> the checkpoint that holds it."""
    sources = {name: given for name, given in parse_spec(spec, CONVERTED_BRANCHES).items() if given != RANDOM}
    by_name = "=" in spec
    if by_name and "flow" in sources:
        sources.setdefault(VOCODER_BRANCH, sources["flow"])
    # Each source is looked up once, however many branches it has: it may be a URL.
    found = {given: find_checkpoint(given) for given in dict.fromkeys(sources.values())}
    folders = {}
    for name in (name for name in CONVERTED_BRANCHES if name in sources):
        folder = found[sources[name]]
        if home := branch_home(folder, name):
            folders[name] = home
        elif by_name and name != VOCODER_BRANCH:
            raise ConfigError(f"checkpoint {folder} has no branch {name}")
    return folders


def _joined_config(folders: Mapping[str, epath.Path]) -> OmniConfig:
    """The architecture: of each branch, what its own checkpoint says."""
    configs = {folder: read_hf(folder / CONFIG) for folder in folders.values()}
    # Codes mean something only with the codebooks that made them: all must describe the same tokenizer.
    coded = [folders[name] for name, branch in BRANCHES.items() if branch.audio_codes and name in folders]
    for folder in coded:
        if configs[folder].audio != configs[coded[0]].audio:
            raise ConfigError(f"{folder / CONFIG} and {coded[0] / CONFIG} describe different audio tokenizers")
    home = configs[folders.get("llm", next(iter(folders.values())))]
    sections = {
        section: getattr(configs[folder], section)
        for name, folder in folders.items()
        for section in BRANCHES[name].sections
    }
    return replace(home, **sections)


def _trained_images(folder: Path | epath.Path | None) -> ImagesConfig:
    """`data.images` of the run whose workdir the checkpoint `folder` lies in."""
    path = folder.parent.parent / RUN_CONFIG if folder and folder.parent.name == "checkpoints" else None
    if path is None or not path.exists():
        return ImagesConfig()
    return from_dict(ImagesConfig, json.loads(path.read_text())["data"].get("images", {}), "data.images.")


def _load(name: str, folder: epath.Path, cfg: OmniConfig, mesh: Mesh, dtype: str) -> nnx.Module:
    kind = jnp.dtype("float32" if BRANCHES[name].dtype == "float32" else dtype)
    compute = ComputePolicy(dtype=kind, remat="none")
    # The vocoder's sizes are its own file's: no other branch is built by them.
    if name == VOCODER_BRANCH and not (folder / VOCODER_CONFIG).is_file():
        raise ConfigError(f"checkpoint {folder} has a branch {VOCODER_BRANCH} but no {VOCODER_CONFIG}")
    vocoder = read_vocoder_config(folder / VOCODER_CONFIG) if name == VOCODER_BRANCH else None
    module = abstract_branches(cfg, vocoder, only=[name], compute=compute)[name]
    placed = with_shardings(module, mesh, compute.rules, dtype=kind, name=name)
    return read_tree(folder / branch_folder(name), placed, f"branch {name}")


def is_untrained(name: str, folder: Path | epath.Path) -> bool:
    """Whether the branch has its first random weights: never trained, and neither converted nor from a run's parent."""
    if origin := read_origin(folder):
        return origin.untrained
    if not (folder / BRANCHES_FILE).exists():
        return False
    info = read_branch_info(folder).get(name)
    if info is None or info.trained:
        return False
    # Put together from public models: a branch of which some part is random computes nothing yet.
    if (folder / PARENT).exists():
        return any(part.partition(".")[0] == name for part in json.loads((folder / PARENT).read_text())["random"])
    if (folder / SOURCE).exists():
        return False
    # A run that took the branch from another checkpoint: random only if it was random there.
    parent = folder.parent.parent / PARENT
    if folder.parent.name != "checkpoints" or not parent.exists():
        return True
    origin = json.loads(parent.read_text()).get("checkpoints", {}).get(name)
    return not origin or is_untrained(name, epath.Path(origin))
