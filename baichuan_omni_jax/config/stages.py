"""The stages of the released recipe as data: which parameters train in each, at what peak rate, and on what rows.

Stages follow one another: each starts from the weights of the one before (`checkpoint.init_from`). The audio tokenizer
is frozen in all of them and runs offline.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    OversizePolicy,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from baichuan_omni_jax.errors import ConfigError

Stage = Literal["image_text_1", "image_text_2", "image_audio_text_1", "image_audio_text_2", "omni_64k", "sft"]
STAGES: tuple[Stage, ...] = get_args(Stage)
# Shares of documents, which weigh by `sqrt`: by what is trainable, videos with a sentence each would fill the rows.
# Both have rows of 64k tokens.
BY_DOCUMENTS = ("omni_64k", "sft")

PROJECTOR, TOWER = BRANCHES["vision"].pattern("projector"), BRANCHES["vision"].pattern("tower")
LANGUAGE, SPEECH = BRANCHES["llm"].pattern(), BRANCHES["audio_head"].pattern()
TEXT_ENDS = LANGUAGE + "(embedding|head)$"

# Its two tables are frozen but for the rows of the media marks, which a text model has never seen.
SPECIAL_TOKENS = "special tokens"

# Groups of each stage: name, pattern, peak learning rate. None freezes; the first matching pattern decides.
_RATES: dict[Stage, tuple[tuple[str, str, float | None], ...]] = {
    "image_text_1": (
        # The report trains the projector alone; the rows and their rate are ours.
        (SPECIAL_TOKENS, TEXT_ENDS, 1e-4),
        ("projector", PROJECTOR, 1e-3),
        ("frozen", ".*", None),
    ),
    "image_text_2": (
        ("language", LANGUAGE, 1e-5),
        ("projector", PROJECTOR, 1e-5),
        ("tower", TOWER, 1e-6),
        ("frozen", ".*", None),
    ),
    "image_audio_text_1": (
        (SPECIAL_TOKENS, TEXT_ENDS, 1e-4),
        ("speech", SPEECH, 1e-4),
        ("frozen", ".*", None),
    ),
    "image_audio_text_2": (
        ("tower", TOWER, None),
        ("language", LANGUAGE, 1e-5),
        ("projector", PROJECTOR, 1e-5),
        ("speech", SPEECH, 1e-5),
    ),
    "omni_64k": (
        ("tower", TOWER, None),
        ("language", LANGUAGE, 4e-6),
        ("projector", PROJECTOR, 4e-6),
        ("speech", SPEECH, 4e-6),
    ),
    "sft": (
        ("tower", TOWER, None),
        ("language", LANGUAGE, 2e-6),
        ("projector", PROJECTOR, 2e-6),
        ("speech", SPEECH, 2e-6),
    ),
}


def stage_groups(stage: str, *, scale: float = 1.0, freeze_text_ends: bool = False) -> tuple[GroupConfig, ...]:
    """Returns the optimizer groups of a stage. The report gives no rate for `sft`: ours is half the one before it.

    Args:
        stage: one of `STAGES`.
        scale: multiplies every rate (a small model learns at higher rates).
        freeze_text_ends: also freezes the text embedding and the output head but for the rows of special tokens, the
            option of the stages that train the language model on audio.

    Raises:
        ConfigError: an unknown stage; `freeze_text_ends` in one that does not train the language model.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    rates = _RATES[stage]
    if freeze_text_ends:
        if not any(name == "language" for name, _, _ in rates):
            raise ConfigError(f"stage {stage!r} freezes the whole language model: freeze_text_ends adds nothing")
        rate = next(rate for name, _, rate in rates if name == "language")
        rates = ((SPECIAL_TOKENS, TEXT_ENDS, rate), *rates)
    return tuple(
        GroupConfig(
            name=name,
            pattern=pattern,
            learning_rate=None if rate is None else rate * scale,
            special_tokens_only=name == SPECIAL_TOKENS,
        )
        for name, pattern, rate in rates
    )


def mixture_of(
    shares: Mapping[str, float], *, oversize: Mapping[str, tuple[OversizePolicy, ...]] | None = None
) -> tuple[SourceConfig, ...]:
    """Returns sources `NAME.jsonl` with these shares; `oversize` are the policies of those that have their own."""
    policies = oversize or {}
    return tuple(
        SourceConfig(name=name, manifest=f"{name}.jsonl", weight=share, oversize=policies.get(name))
        for name, share in shares.items()
    )


def stage_run(
    stage: Stage,
    shares: Mapping[str, float],
    *,
    steps: int,
    warmup_steps: int,
    patches: int = 131072,
    audio_frames: int = 16384,
    audio_targets: int = 8192,
    oversize: tuple[OversizePolicy, ...] = ("chunk_text",),
) -> RunConfig:
    """Returns a stage's run at released size on 64 chips (v5p:4x4x4), from the weights of the stage before it.

    Rows have 8192 tokens, 128 a step, or in the stages of `BY_DOCUMENTS` 65536, 16 a step: 2**20 tokens either way.

    Args:
        stage: its groups and learning rates are `stage_groups`.
        shares: source -> its share of the mixture; a manifest DATA_ROOT/NAME.jsonl each. Of the loss, or in the stages
            of `BY_DOCUMENTS` of documents.
        steps: how many, and to which the learning rate decays.
        warmup_steps: of the learning rate.
        patches: what a row holds of each at most (`Budgets`), as `audio_frames` and `audio_targets`.
        audio_frames: see `patches`.
        audio_targets: see `patches`.
        oversize: what is tried on documents beyond a budget; interleaved ones are always cut in chunks.
    """
    by_documents = stage in BY_DOCUMENTS
    data = DataConfig(
        root="data/omni",
        mixture=mixture_of(shares, oversize={"interleaved": ("chunk",)}),
        weights_by="documents" if by_documents else "trainable",
        oversize=oversize,
        rows=16 if by_documents else 128,
        budgets=Budgets(
            tokens=65536 if by_documents else 8192,
            patches=patches,
            audio_frames=audio_frames,
            audio_targets=audio_targets,
        ),
        workers=8,
        audio_tokenizer="weights/omni",
        # Images of up to 16384 patches, on any mesh with context x tensor of 1, 2, 4 or 8.
        media_shards=8 if by_documents else 1,
        # One conversation of 64k tokens costs nearly twice what a row of short ones does.
        order_window=16 if by_documents else 1,
    )
    number = STAGES.index(stage)
    return RunConfig(
        name=stage,
        mesh=MeshConfig(fsdp=16, context=4) if by_documents else MeshConfig(fsdp=64),
        data=data,
        optimizer=OptimizerConfig(groups=stage_groups(stage), warmup_steps=warmup_steps, decay_steps=steps),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        train=TrainConfig(
            steps=steps,
            # Between a weight for every target and one for every document: long text does not drown out short answers.
            document_weighting="sqrt" if by_documents else "token",
            # A frame to predict counts as much as a text target.
            audio_full_ratio=1.0,
        ),
        checkpoint=CheckpointConfig(every=500, init_from=f"runs/{STAGES[number - 1]}" if number else "weights/omni"),
    )


def tiny_stage(stage: str, shares: Mapping[str, float], *, scale: float = 1.0, steps: int = 12) -> RunConfig:
    """Returns a stage's run on the tiny model and the offline sample data: the chain of stages in minutes on a laptop.

    Shares are of the loss, but in the stages of `BY_DOCUMENTS`, as at released size. `scale` multiplies the rates.
    """
    by_documents = stage in BY_DOCUMENTS
    return RunConfig(
        name=f"{stage}_tiny",
        model="tiny",
        data=DataConfig(
            root="data/sample",
            sample=True,
            mixture=mixture_of(shares),
            weights_by="documents" if by_documents else "trainable",
            rows=2,
            budgets=Budgets(tokens=512, patches=384, audio_frames=192, audio_targets=144),
            workers=0,
        ),
        optimizer=OptimizerConfig(groups=stage_groups(stage, scale=scale), warmup_steps=2, decay_steps=steps),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=256, attention_block=128),
        train=TrainConfig(
            steps=steps,
            frozen_dtype="float32",
            document_weighting="sqrt" if by_documents else "token",
            audio_full_ratio=1.0,
        ),
        checkpoint=CheckpointConfig(every=steps, keep=1),
    )
