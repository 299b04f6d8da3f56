"""The stages of the released recipe as data: which parameters train in each, and at what peak rate.

Stages follow one another: each starts from the weights of the one before (`checkpoint.init_from`). The audio tokenizer
is frozen in all of them and runs offline.
"""

from collections.abc import Mapping

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GroupConfig,
    OptimizerConfig,
    OversizePolicy,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from baichuan_omni_jax.errors import ConfigError

PROJECTOR, TOWER = BRANCHES["vision"].pattern("projector"), BRANCHES["vision"].pattern("tower")
LANGUAGE, SPEECH = BRANCHES["llm"].pattern(), BRANCHES["audio_head"].pattern()
TEXT_ENDS = LANGUAGE + "(embedding|head)$"

# Its two tables are frozen but for the rows of the media marks, which a text model has never seen.
SPECIAL_TOKENS = "special tokens"

# In order. None freezes; the first matching pattern decides.
_RATES: dict[str, tuple[tuple[str, str, float | None], ...]] = {
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
STAGES = tuple(_RATES)
# Shares of documents, which weigh by `sqrt`: by what is trainable, videos with a sentence each would fill the rows.
BY_DOCUMENTS = ("omni_64k", "sft")


def stage_groups(stage: str, *, scale: float = 1.0, freeze_text_ends: bool = False) -> tuple[GroupConfig, ...]:
    """The optimizer groups of a stage, every rate times `scale` (a small model learns at higher rates).

    `freeze_text_ends` also freezes the text embedding and the output head but for the rows of special tokens, the
    option of the stages that train the language model on sound. The report gives no rate for `sft`: ours is half the
    one before it.
    Raises ConfigError on an unknown stage, and for `freeze_text_ends` in one that does not train the language model.
    """
    if stage not in _RATES:
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
    """Sources `NAME.jsonl` with these shares; `oversize` are the policies of those that have their own."""
    policies = oversize or {}
    return tuple(
        SourceConfig(name=name, manifest=f"{name}.jsonl", weight=share, oversize=policies.get(name))
        for name, share in shares.items()
    )


def tiny_stage(stage: str, shares: Mapping[str, float], *, scale: float = 1.0, steps: int = 12) -> RunConfig:
    """A stage's groups on the tiny model and the offline sample data: the chain of stages in minutes on a laptop.

    Shares are of the loss, but in the stages of `BY_DOCUMENTS`, as at released size.
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
