"""`RunConfig`: everything a run decides that is not architecture. One file in `configs/` builds one.

Every field is described on its own line, or right above it: what it is, its unit, why its default. Paths may begin with
`~`.
"""

from dataclasses import dataclass, field, fields
from math import inf
from typing import Literal

from baichuan_omni_jax.branches import OMNI_BRANCHES, BranchName
from baichuan_omni_jax.config.audio import FlowTrainConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.overrides import check_ranges

Task = Literal["omni", "audio_tokenizer", "flow_matching"]
Dtype = Literal["bfloat16", "float32"]
# What is tried on a document beyond a budget: `split` between its turns; `fewer_frames` of its videos; `chunk` into
# stretches that fit, before media where it has any; `chunk_text`, the same of documents of text alone.
OversizePolicy = Literal["split", "fewer_frames", "chunk", "chunk_text"]
# How a still becomes RGB: as a person sees it, or as the released processor takes it.
ImageRendering = Literal["seen", "released"]


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; their product must be the number of devices. -1 on one axis takes what is left."""

    data: int = 1  # whole copies of the model, which share out the rows; the only axis that crosses slices
    fsdp: int = 1  # rows are shared out and parameters split: the first axis to grow, as it saves memory at little cost
    context: int = 1  # splits each row's tokens: for rows too long for one chip
    tensor: int = 1  # splits heads and MLP widths: the most communication, so the last axis to grow
    slices: int = 1  # TPU slices joined by the data-center network; `data` must be a multiple of it


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents and its weight in the mixture."""

    name: str  # its own among all sources: metrics and the plan's state go by it
    manifest: str  # below `DataConfig.root`: a JSONL file, or the folder of a built data set (`dataset.json`)
    weight: float = 1.0  # its share of the mixture, relative to the others'; see `DataConfig.weights_by`
    # The folder below `DataConfig.root` that media paths are relative to, beside the manifest's own; a built data set
    # has its media inside.
    root: str = ""
    loss_weight: float = 1.0  # multiplies the loss weight of all that its documents train on, text and audio
    oversize: tuple[OversizePolicy, ...] | None = None  # None: `DataConfig.oversize`


_LEFT_OUT = ("text_targets", "mel_windows", "items")  # budgets of which 0 is no limit


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What one packed row holds at most. Static shapes: every row of a run has exactly these sizes.

    The defaults are those of the released model's longest stage, 64k tokens (arXiv:2501.15368).
    """

    tokens: int = 65536  # the row's length; visual tokens and code frames included
    patches: int = 65536  # of 14x14 pixels, four of which become one token; 0: no images
    audio_frames: int = 16384  # code frames (12.5 a second) read or spoken
    audio_targets: int = 8192  # code frames to predict, one end frame for each spoken clip included
    # Tokens that predict text: logits are computed for so many. 0: no limit, and logits for every token.
    text_targets: int = 0
    # Windows of at most 30 s of audio that the batch holds as log mel, for the tasks that train on audio. 0: no arrays.
    mel_windows: int = 0
    items: int = 0  # media: images, video frames, clips. 0: no limit

    def limits(self) -> dict[str, int]:
        """Returns what a row is held to, by name: the budgets without those that are left out."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: size for name, size in sizes.items() if size or name not in _LEFT_OUT}


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """How stills become RGB. The data index is made anew when it changes."""

    orientation: ImageRendering = "seen"  # EXIF orientation is applied; released: pixels as they are stored
    alpha: ImageRendering = "seen"  # transparent pixels lie over white; released: transparency is dropped
    depth: ImageRendering = "seen"  # more than 8 bits, and floats, are scaled to 8; released: as Pillow converts them
    profile: ImageRendering = "seen"  # an ICC profile is converted to sRGB; released: it is ignored


def released_images() -> ImagesConfig:
    """Returns how the released processor takes stills, byte for byte: for comparisons with it."""
    return ImagesConfig(orientation="released", alpha="released", depth="released", profile="released")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how rows are made."""

    # --- What is read.
    root: str = "data"  # the folder or URL that manifests lie below
    # Folders that links inside a source's folder of media may lead to; that folder itself always is one. The default
    # trusts every link, since whoever made the folder made it; `()` none. What a manifest names must lie inside.
    trusted_roots: tuple[str, ...] = ("/",)
    sample: bool = False  # builds the offline sample data set at `root` when it is not there yet
    mixture: tuple[SourceConfig, ...] = ()
    # What the sources' weights are shares of; `trainable` counts text targets and audio frames to predict.
    weights_by: Literal["documents", "tokens", "trainable"] = "documents"
    continue_sources: bool = False  # each source goes on where the run of `checkpoint.init_from` left it
    seed: int = 0  # of the order of documents
    # Decoding processes a host; 0: in the training process. "auto": by its cores and memory
    # (`data_pipelines.packing.rows.worker_count`).
    workers: int | Literal["auto"] = "auto"
    # A `tokenizer.json`. "": that of the weights the run starts from, else one trained on the manifests' own text, of
    # the model's `llm.vocab_size` entries.
    tokenizer: str = ""
    # A checkpoint. "": the one that the codes of `checkpoint.init_from` were made by, else a seeded random one, whose
    # codes carry no decodable audio.
    audio_tokenizer: str = ""
    images: ImagesConfig = ImagesConfig()

    # --- Which documents, and what becomes of long ones.
    end_of_text: bool = True  # appends the end of text to documents that lack it, so that answers learn to end
    # Documents in which nothing is marked as trainable: train on all of their text and speech, as the released model's
    # do, or skip them.
    unmarked: Literal["all", "refuse"] = "all"
    # What is tried, in order, on a document beyond a budget. What then is still too long is skipped.
    oversize: tuple[OversizePolicy, ...] = ("chunk_text",)
    max_bad_fraction: float = 0.05  # the share of documents that may be unusable before the run stops
    # Seconds for which a read is tried again that storage refuses (a server that restarts, a mount that hangs). After
    # them the run ends, with exit code 1: what storage refuses is no damaged document, and is never left out.
    patience: float = 300.0
    # Where `root` is a URL: the folder of this machine that shards and media are read through, and indexes kept in. "":
    # `$XDG_CACHE_HOME/baichuan_omni_jax`, or `~/.cache/baichuan_omni_jax`.
    cache: str = ""
    # GiB of shards and media that the cache holds at most, for all processes of the machine. Documents come in random
    # order: with less than the shards of the mixture have, each of them is fetched again and again.
    cache_gb: float = 50.0
    # MB of manifests and shards that a start of training indexes or encodes itself, of a source and in all; more are
    # refused. 0: any, but 64 where several hosts would wait for it; -1: any.
    max_unprepared_mb: int = 0

    # --- Rows.
    rows: int = 16  # a step, over all devices
    budgets: Budgets = Budgets()
    open_bins: int = 8  # rows that are filled at a time: more fill better and mix documents further apart
    look_ahead: int = 128  # further documents of the stream that a row may be filled from
    order_window: int = 1  # steps whose rows are ordered together so that all ranks have equal work; 1: as packed
    # Mel frames that a window's slot may have (with `budgets.mel_windows`), ascending; a step takes the smallest that
    # holds its longest window, longer ones are cropped. (): a whole window of 30 s.
    mel_frames: tuple[int, ...] = ()

    # --- Rows over a mesh with `context` > 1.
    context_block: int = 512  # tokens; rows are cut in blocks of so many, which are dealt to the shards
    # Deals blocks by attention work, or keeps their order.
    context_plan: Literal["balanced", "contiguous"] = "balanced"
    # A row's patches lie in so many equal parts, and no image in two of them: a multiple of the mesh's context x
    # tensor. Which documents share a row depends on it, so it stays when the mesh changes.
    media_shards: int = 1

    def __post_init__(self) -> None:
        ranges = {"patience": (0, inf), "cache_gb": (0, inf), "max_unprepared_mb": (-1, inf)}
        check_ranges(self, "data.", ranges | {"workers": (0, 1024)})


@dataclass(frozen=True, kw_only=True)
class EvalMixture:
    """Held-out documents under one name."""

    name: str  # a part of the metrics' keys
    sources: tuple[SourceConfig, ...]  # as in `DataConfig.mixture`, from the same root
    # Whether the documents are also scored with another document's media: what the model loses by them is what it
    # sees and hears. Costs about as much again, twice. Of the task `omni` alone.
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss; abilities and public benchmarks; and in tasks that train on audio samples of it."""

    every: int = 0  # steps between evaluations of the loss; 0: never
    steps: int = 1  # the first so many of each mixture, the same in every evaluation
    # Steps between samples of audio in TensorBoard, clips as they come back from their codes, as WAV and as mels; 0:
    # never.
    audio_every: int = 0
    audio_samples: int = 2  # the first so many clips of each mixture
    vocoder: str = ""  # a checkpoint with a HiFT vocoder, for the mels of flow matching; "": Griffin-Lim
    mixtures: tuple[EvalMixture, ...] = ()
    # Whether `mixtures` and `abilities` are of the sample data: a run with `data.sample=false` has none of them.
    sample: bool = False
    # A folder below `data.root` with a manifest of held-out documents for every source, `FOLDER/SOURCE.jsonl`, their
    # media where the source's own are: they are the mixture `held_out`, scored with swapped media too. "": none.
    held_out: str = ""

    # --- Answers of the weights in training, of the task `omni`: docs/how-to/evaluate.md.
    # Mixtures whose documents are asked: each source is an ability, and what its documents teach first is the answer.
    abilities: tuple[str, ...] = ()
    ability_every: int = 0  # steps between; 0: after the last one alone
    ability_items: int = 32  # documents of each source, the first so many
    # Public benchmarks by their names in `baichuan-omni evaluate --suite`.
    suites: tuple[str, ...] = ()
    suite_every: int = 0  # as `ability_every`
    suite_items: int = 0  # of each group of a suite, the first so many; 0: all
    suite_data: str = "data"  # the folder that the suites' own folders lie in
    # Who judges free answers: `rules`, `exact`, `none`, or the URL of an OpenAI-compatible server, up to /v1.
    suite_judge: str = "rules"


OptimizerName = Literal["adamw", "adafactor", "muon"]


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    r"""Parameters that train alike: those whose path matches `pattern`, unless a group before matches."""

    name: str  # a part of the metrics' keys
    pattern: str  # a regular expression that a path (`llm.layers.attention.q_proj.weight`) begins with
    learning_rate: float | None  # at its peak; None freezes the group: no gradient, no optimizer state
    warmup_steps: int | None = None  # None, here and below: as in `OptimizerConfig`
    decay_steps: int | None = None
    final_fraction: float | None = None
    weight_decay: float | None = None  # None is 0 with `special_tokens_only`
    optimizer: OptimizerName | None = None
    # The group's tables (`llm.embedding`, `llm.head`) are frozen but for the rows of the special tokens.
    special_tokens_only: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Linear warm-up, cosine decay, and by default AdamW, whose decays are those that 7B language models train with."""

    groups: tuple[GroupConfig, ...] = (GroupConfig(name="all", pattern=".*", learning_rate=1e-4),)
    # adafactor: of second moments the sums over rows and columns, no first ones, so hardly any state. muon: orthogonal
    # updates of the layers' matrices, by one moment; the group's other parameters go by AdamW.
    optimizer: OptimizerName = "adamw"
    warmup_steps: int = 100  # from 0 to the peak
    decay_steps: int = 10000  # counted from step 0; then the rate stays, so that a run can go on
    final_fraction: float = 0.1  # of the peak, at the end of the decay
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float | None = None  # None: 0.1 for the task `omni`, none for the tasks that train on audio
    clip_norm: float = 1.0  # of the global gradient
    # What both moments are kept in between steps; they are computed in fp32. bfloat16 saves 4 bytes a parameter. With
    # `b2` above 0.99 the second one would stand still: what a step changes is lost to rounding.
    moments_dtype: Dtype = "float32"


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the step is computed: none of it changes what is learned, but for rounding."""

    dtype: Dtype = "bfloat16"  # of products and activations; trainable weights, norms, softmax and losses are fp32
    # What a layer keeps for its backward pass besides its input: `full` nothing, all is recomputed; `none` everything;
    # names joined by + those values, as attention_out+qkv (`nn/remat.py` lists them), `@host` behind a name in the
    # host's memory; `fit` as many as the device's memory holds, found by compiling when the run starts.
    remat: str = "full"
    # Positions of a row and shard; as many vocabulary logits are in memory at once as these would have. 0: all of them,
    # and none is made a second time in the backward pass.
    loss_chunk: int = 1024
    mlp_chunk: int = 0  # positions of a row and shard that have the MLP's wide intermediates at once; 0: all
    # int8: the language model's layers multiply so, forward and toward their input, with gradients rounded by chance.
    # For the task `omni`; logits, encoders and the audio head stay as they are.
    quantize: Literal["none", "int8"] = "none"
    # Which kernel computes attention. "": the best that the platform supports; a name never falls back.
    attention: Literal["", "pallas_tpu", "pallas_gpu", "xla", "reference"] = ""
    # Tokens a side of the blocks that attention is planned by. "auto": what the platform is served by best, and the
    # language model's on TPUs by the documents of the run's first rows (`kernels/flash_attention/block_choice.py`).
    attention_block: int | Literal["auto"] = 512
    attention_q_block: int = 0  # of queries in the language model; 0: as above
    attention_kv_block: int = 0  # of keys in the language model; 0: as above
    # XLA's, NAME=VALUE, for the training step, behind those that the chip has in `train/step.py`: the last one counts.
    compiler_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("loss_chunk", "mlp_chunk", "attention_q_block", "attention_kv_block"), (0, inf))
        check_ranges(self, "compute.", ranges | {"attention_block": (1, inf)})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length and seed of a run, and the weights of its losses."""

    steps: int = 1000
    accumulate: int = 1  # parts that a step's rows go through the model in, one after the other, for one update
    nonfinite_limit: int = 3  # steps in a row whose loss or gradient is not finite, and which update nothing: then stop
    seed: int = 0  # of first weights, and of what a step draws
    audio_loss_weight: float = 1.0  # of the audio loss beside the text loss
    audio_level_weights: tuple[float, ...] = ()  # of each level's loss within it; (): 1 / levels each
    # The audio loss has its full weight in a step with at least so many frames to predict for every text target, and
    # proportionally less below: no frame ever weighs more than `audio_loss_weight / audio_full_ratio` text targets. 0:
    # always full.
    audio_full_ratio: float = 0.05
    # A document counts in each modality's loss by its targets there, the square root of them, or as any other.
    document_weighting: Literal["token", "sqrt", "document"] = "token"
    # What frozen parameters are computed from; checkpoints keep what was lost by rounding to it.
    frozen_dtype: Dtype = "bfloat16"
    # Whether groups with `special_tokens_only` train; off for weights that know the special tokens, as the released do.
    special_token_rows: bool = True
    special_token_ids: tuple[int, ...] = ()  # (): the media marks of `OmniConfig.tokens`, without the end of text


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, how many to keep, and what to start from."""

    every: int = 100  # steps
    keep: int = 3  # newest steps
    # Steps between those that each host keeps on its own disk as well, two at a time, for a restart on the same
    # machines; 0: none.
    local_every: int = 0
    local_dir: str = ""  # the folder for them; "": below `$XDG_CACHE_HOME` or `~/.cache`
    # `DIR` or `branch=DIR,...`, a checkpoint or a workdir; `branch=random` leaves a branch as it was drawn. "": all.
    init_from: str = ""
    # A run of the task `audio_tokenizer`, or its checkpoint: audio embeddings begin as what the reader of its
    # transcripts made of each code (`train/transcript_reader.py`); for an `llm` that is that reader. "": as drawn or
    # read.
    audio_embeddings_from: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, "checkpoint.", {"every": (1, inf), "keep": (1, inf), "local_every": (0, inf)})


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a step counts as hung, and what is worth an alert. None of it changes what is learned: docs/how-to/watch.md.

    Times in seconds.
    """

    # --- Hangs: all hosts write their stacks, the one that others wait for is named, and the run ends to be started
    # again (exit code 76).
    # A step is hung after so many times the median step, and after `hang_s` at least: the longest that a bucket is
    # known to be away. 0: never.
    hang_s: float = 180.0
    hang_factor: float = 10.0
    # The same for what is no step and has no median: compiling, a save, an evaluation of suites. 0: never.
    pause_s: float = 14400.0
    # A host that gives no sign of life for so long is named: before JAX itself ends the run, after 100 s, naming none.
    silent_s: float = 60.0

    # --- Hosts beside each other, in a line of the log and in the metrics.
    hosts_every: int = 100  # steps; 0: never

    # --- Alerts, in the log and in alerts.jsonl.
    # How far loss and gradient norm may lie above the median of the last steps, in standard deviations. 0: no alerts.
    spike: float = 6.0
    data_wait: float = 0.05  # the share of the last steps' time that devices may wait for rows
    # An update larger than so many times the parameters of its group: the run diverges.
    update_share: float = 1.0

    # --- Silent corruption.
    # Steps between two that are computed twice and compared bit for bit, at the cost of two more steps; 0: never.
    replay_every: int = 0

    def __post_init__(self) -> None:
        ranges = {number.name: (0, inf) for number in fields(self)}
        check_ranges(self, "watch.", ranges | {"update_share": (1e-3, inf)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run."""

    name: str
    model: str = "baichuan_omni_7b"  # a variant of `OmniConfig`, or the path of a Hugging Face config.json
    # The machine that a stage of the recipe is sized for (`config/machines.py`), and preflight's `--topology` unless
    # told otherwise. `--set machine=NAME` sizes the whole run anew; configurations of other kinds have none.
    machine: str = ""
    # What trains: the language model with vision and audio, the audio tokenizer, or the flow-matching decoder.
    task: Task = "omni"
    # What the step computes. Of `omni`, `llm` is among them: without `vision` or `audio_head` the model lacks these
    # parameters and the batch their media.
    branches: tuple[BranchName, ...] = OMNI_BRANCHES
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    tokenizer: TokenizerTrainConfig = TokenizerTrainConfig()  # of the task `audio_tokenizer`
    flow: FlowTrainConfig = FlowTrainConfig()  # of the task `flow_matching`
    watch: WatchConfig = WatchConfig()
