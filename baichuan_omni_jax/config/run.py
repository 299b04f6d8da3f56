"""`RunConfig`: everything a run decides that is not architecture. One file in `configs/` builds one."""

import re
import runpy
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from baichuan_omni_jax.config.audio import FlowTrainConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.overrides import RENAMED, check_kinds
from baichuan_omni_jax.errors import ConfigError

Policy = Literal["split", "fewer_frames", "chunk", "chunk_text"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; the product must be the number of devices. -1 on one axis takes what is left.

    With `slices` > 1 the devices are that many TPU slices joined by the data-centre network, and `data`, a multiple of
    `slices`, is the only axis that crosses from one to another.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents and its weight in the mixture.

    `manifest`, below `DataConfig.root`, is a JSONL file or the folder of a built data set (`dataset.json`). `name` is
    its own: metrics and the plan's state go by it. A manifest's media paths are relative to the folder it lies in or to
    `root`, a folder below `DataConfig.root`; a data set has its media inside.
    """

    name: str
    manifest: str
    weight: float = 1.0
    root: str = ""
    # Multiplies the weight in the loss of all that its documents train on, text and audio.
    loss_weight: float = 1.0
    # What is tried on its documents beyond a budget; None: `DataConfig.oversize`.
    oversize: tuple[Policy, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What one packed row holds at most. Static shapes: every row of a run has exactly these sizes.

    `tokens` is the row length; `patches` counts 14x14 patches (four become one token); `audio_frames` counts code
    frames heard or spoken; `audio_targets` counts frames to predict, one end frame for each spoken clip included.

    Two may be left out (0: no limit, and no arrays): `mel_windows`, windows of at most 30 s of sound that the batch
    holds as log mel; `items`, media (pictures, video frames, clips).
    """

    tokens: int = 65536
    patches: int = 65536
    audio_frames: int = 16384
    audio_targets: int = 8192
    mel_windows: int = 0
    items: int = 0

    def limits(self) -> dict[str, int]:
        """What a row is held to, by name: the budgets without those that are left out."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: size for name, size in sizes.items() if size or name not in ("mel_windows", "items")}


Rendering = Literal["seen", "released"]


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How stills become RGB: as a person sees them (`seen`), or as the released processor takes them (`released`)."""

    orientation: Rendering = "seen"  # EXIF orientation is applied; released: pixels as they are stored
    alpha: Rendering = "seen"  # transparent pixels lie over white; released: transparency is dropped
    depth: Rendering = "seen"  # more than 8 bits, and floats, are scaled to 8; released: as Pillow converts them
    profile: Rendering = "seen"  # an ICC profile is converted to sRGB; released: it is ignored


def released_images() -> ImagesConfig:
    """Stills with the bytes of the released processor: for comparisons with it."""
    return ImagesConfig(orientation="released", alpha="released", depth="released", profile="released")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how rows are made. Paths may start with `~`; `root` is the folder that manifests lie below.

    `trusted_roots` are the folders that links inside a source's folder of media may lead to; that folder itself always
    is one. The default trusts every link, since whoever made the folder made it; `()` none that leaves it. What a
    manifest writes must lie inside whatever is trusted.
    `sample` asks for the offline sample data set, built at `root` when it is not there yet.
    `tokenizer` is a path to a `tokenizer.json`; empty trains one of `vocab_size` entries on the manifests' own text.
    `audio_tokenizer` is a checkpoint (`DIR`); empty is the one that the codes of `checkpoint.init_from` were made by,
    else a seeded random one, whose codes carry no decodable sound.
    `max_bad_fraction` is the share of documents that may be unusable before the run stops.

    The sources' weights are shares of what is counted by `weights_by`: `documents`, `tokens`, or what is `trainable`:
    text targets and audio frames to predict. With `continue_sources` each source goes on where the run of
    `checkpoint.init_from` left it; else it starts anew.
    `oversize` names what is tried, in order, on a document beyond a budget: `split` between its turns, `fewer_frames`
    of its videos, `chunk` into stretches that fit, before media where it has any, `chunk_text` the same of documents of
    text alone. What then is still too long is skipped.
    `unmarked` documents, in which nothing is marked as trainable, train on `all` of their text and speech, or are
    skipped (`refuse`).

    Rows: `open_bins` are filled at a time, from the next documents of the stream and a pool of `look_ahead` more.
    The rows of `order_window` steps are ordered together so that all ranks have equal work in each step (1: as packed).

    On a mesh with `context` > 1 rows are cut in blocks of `context_block` tokens; `context_plan` says which shard gets
    which: `balanced` deals them by attention work, `contiguous` keeps their order.
    `media_shards`: a row's patches lie in this many equal parts, and no picture in two of them. A multiple of the
    mesh's context x tensor; which documents share a row depends on it, so it stays when the mesh changes.

    `images`: how stills are taken; the index is made anew when it changes.

    `mel_frames`: with `budgets.mel_windows`, how many mel frames a window's slot has, in ascending sizes; a step takes
    the smallest that holds its longest window, and longer windows are cropped. Empty: a whole window of 30 s.
    """

    root: str = "data"
    trusted_roots: tuple[str, ...] = ("/",)
    sample: bool = False
    mixture: tuple[SourceConfig, ...] = ()
    rows: int = 16
    budgets: Budgets = Budgets()
    weights_by: Literal["documents", "tokens", "trainable"] = "documents"
    continue_sources: bool = False
    oversize: tuple[Policy, ...] = ("chunk_text",)
    unmarked: Literal["all", "refuse"] = "all"
    open_bins: int = 8
    look_ahead: int = 128
    order_window: int = 1
    seed: int = 0
    workers: int = 2
    tokenizer: str = ""
    audio_tokenizer: str = ""
    end_of_text: bool = True
    max_bad_fraction: float = 0.05
    context_block: int = 512
    context_plan: str = "balanced"
    media_shards: int = 1
    mel_frames: tuple[int, ...] = ()
    images: ImagesConfig = ImagesConfig()


@dataclass(frozen=True, kw_only=True)
class EvalMixture:
    """Held-out documents under one name: sources as in `DataConfig.mixture`, read from the same root."""

    name: str
    sources: tuple[SourceConfig, ...]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss: every `every` steps (0: never) over the first `steps` steps of each mixture.

    In tasks that train on audio, every `audio_every` steps (0: never) the first `audio_samples` clips of each go to
    TensorBoard as they come back from their codes, as WAV and as pictures of their mels. `vocoder` is a checkpoint with
    a HiFT vocoder for the mels of flow matching; empty: Griffin-Lim.
    """

    every: int = 0
    steps: int = 1
    audio_every: int = 0
    audio_samples: int = 2
    vocoder: str = ""
    mixtures: tuple[EvalMixture, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Parameters whose path (`llm.layers.attention.q_proj`) matches `pattern` from its start; the first match wins.

    `learning_rate` None freezes the group: no gradient, no optimizer state. The schedule's other numbers are those of
    `OptimizerConfig` where they are None. With `special_tokens_only` the group's tables (`llm.embedding`, `llm.head`)
    are frozen but for the rows of the special tokens (`train.special_token_rows`); a `weight_decay` of None is 0 there.
    """

    name: str
    pattern: str
    learning_rate: float | None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    final_fraction: float | None = None
    weight_decay: float | None = None
    special_tokens_only: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay. Learning rates are the groups' peaks.

    After `decay_steps` (counted from step 0) the rate stays at `final_fraction` of its peak, so a run can go on.
    `weight_decay` None is 0.1 for the task `omni`, and none for the tasks that train on sound.
    """

    groups: tuple[GroupConfig, ...] = (GroupConfig(name="all", pattern=".*", learning_rate=1e-4),)
    warmup_steps: int = 100
    decay_steps: int = 10000
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float | None = None
    clip_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the step is computed. `attention` and `rvq` name a kernel implementation; empty picks by platform.

    `loss_chunk`: as many vocabulary logits are in memory at once as this many positions of a row have per shard (all
    positions, a piece of the vocabulary at a time). `mlp_chunk`: how many positions of a row per shard have the MLP's
    wide intermediates in memory at once (0: the whole row).
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    loss_chunk: int = 1024
    mlp_chunk: int = 0
    attention: str = ""
    attention_block: int = 512


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and seed of a run, and the weights of its losses (`audio_level_weights` empty: 1/levels each).

    A step's rows go through the model in `accumulate` equal parts, one after the other, and update it once.
    A step whose loss or gradient is not finite updates nothing; `nonfinite_limit` of them in a row end the run.

    `document_weighting` says what a document counts in the loss of each modality: as much as it has targets there
    (`token`), the square root of that (`sqrt`), or as much as any other (`document`).
    The audio loss has its full weight in a step with at least `audio_full_ratio` frames to predict for every text
    target, and proportionally less below: no frame ever weighs more than `audio_loss_weight / audio_full_ratio` text
    targets (0: always full).
    `special_token_rows`: whether groups with `special_tokens_only` train; off for weights that know the special tokens,
    as the released ones do. `special_token_ids` names the tokens; empty: the model's media marks (`OmniConfig.tokens`
    without the end of text). `frozen_dtype` is what frozen parameters are computed from; checkpoints keep what was lost
    by rounding to it.
    """

    steps: int = 1000
    accumulate: int = 1
    nonfinite_limit: int = 3
    seed: int = 0
    audio_loss_weight: float = 1.0
    audio_level_weights: tuple[float, ...] = ()
    audio_full_ratio: float = 0.05
    document_weighting: Literal["token", "sqrt", "document"] = "token"
    frozen_dtype: str = "bfloat16"
    special_token_rows: bool = True
    special_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and how many steps to keep. `init_from` is `DIR` or `branch=DIR,...`; empty is random.

    `branch=random` leaves a branch as it was drawn.
    """

    every: int = 100
    keep: int = 3
    init_from: str = ""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run. `model` names a variant of `OmniConfig` or a Hugging Face config.json by path.

    `task` is what trains: `omni`, the language model with its senses; `audio_tokenizer`, with the settings `tokenizer`;
    `flow_matching`, with the settings `flow`. `branches` are those the step computes. Of `omni`, `llm` is among them:
    without `vision` or `audio_head` the model lacks these parameters and the batch their media.
    """

    name: str
    model: str = "baichuan_omni_7b"
    task: str = "omni"
    branches: tuple[str, ...] = ("vision", "llm", "audio_head")
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tokenizer: TokenizerTrainConfig = TokenizerTrainConfig()
    flow: FlowTrainConfig = FlowTrainConfig()


def load_run_config(path: str | Path) -> RunConfig:
    """Runs the file at `path` and calls its `get_config()`.

    Raises ConfigError when there is no such thing, and with the line where the file fails.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        namespace = runpy.run_path(str(path))
        if "get_config" not in namespace:
            raise ConfigError(f"config file {path} defines no get_config()")
        config = namespace["get_config"]()
    except ConfigError:
        raise
    # The file is the user's, and so is whatever it does wrong: a misspelled field, a name that is not imported.
    except Exception as error:
        raise ConfigError(_failure(error, path)) from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"get_config() of {path} returned {type(config).__name__}, not RunConfig")
    check_kinds(config)
    return config


def _failure(error: Exception, path: str | Path) -> str:
    """One sentence: the file at `path`, the line of it that failed (the innermost, if any), and why."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    why = " ".join(str(error).split()) or "nothing is told"
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, why = [error.lineno], f"it is not Python: {error.msg}"
    # A misspelled field may be one that was renamed: all that Python says of it is its last word.
    renamed = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    if (unknown := re.search(r"unexpected keyword argument '(\w+)'", why)) and unknown[1] in renamed:
        why += f": it is now {renamed[unknown[1]]}"
    place = f", line {lines[-1]}" if lines else ""
    return f"config file {path}{place}: {type(error).__name__}: {why}"
