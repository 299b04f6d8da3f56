"""The stages of the released recipe as data: which parameters train in each, at what peak rate, and on what rows.

Stages follow one another: each starts from the weights of the one before (`checkpoint.init_from`). The audio tokenizer
is frozen in all of them and runs offline.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config.machines import (
    RELEASED_MACHINE,
    STEP_TOKENS,
    Language,
    fit_of,
    layout_of,
    step_tokens_of,
)
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalMixture,
    GroupConfig,
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
TEXT_ENDS, ATTENTION = LANGUAGE + "(embedding|head)$", LANGUAGE + r"layers\.attention\."

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


def stage_groups(
    stage: str, *, scale: float = 1.0, freeze_text_ends: bool = False, language: Language = "all"
) -> tuple[GroupConfig, ...]:
    """Returns the optimizer groups of a stage. The report gives no rate for `sft`: ours is half the one before it.

    Args:
        stage: one of `STAGES`.
        scale: multiplies every rate (a small model learns at higher rates).
        freeze_text_ends: also freezes the text embedding and the output head but for the rows of special tokens, the
            option of the stages that train the language model on audio.
        language: the parts of the language model that train where the stage trains it; `layers` and `attention` freeze
            the rest, the text ends as `freeze_text_ends` does.

    Raises:
        ConfigError: an unknown stage; `freeze_text_ends` in one that does not train the language model.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    rates = _RATES[stage]
    trained = next((rate for name, _, rate in rates if name == "language"), None)
    if freeze_text_ends and trained is None:
        raise ConfigError(f"stage {stage!r} freezes the whole language model: freeze_text_ends adds nothing")
    # The first matching pattern decides: what stays of the language model comes before the rest of the stage.
    if trained is not None and language == "attention":
        attention, rest = ("attention", ATTENTION, trained), ("rest of the language model", LANGUAGE, None)
        others = tuple(group for group in rates if group[0] != "language")
        rates = ((SPECIAL_TOKENS, TEXT_ENDS, trained), attention, rest, *others)
    elif freeze_text_ends or (trained is not None and language == "layers"):
        rates = ((SPECIAL_TOKENS, TEXT_ENDS, trained), *rates)
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


def path_in(home: str, path: str) -> str:
    """Joins a folder or URL and a path below it; without one the path stays relative to where a command is started."""
    return f"{home.rstrip('/')}/{path}" if home else path


def held_out_of(names: Iterable[str], *, mixture: str = "held_out", swapped: bool = False) -> EvalMixture:
    """Returns the held-out documents of manifests `held_out/NAME.jsonl`, whose media lie below the data's root.

    `swapped` as in `EvalMixture`.
    """
    sources = tuple(SourceConfig(name=name, manifest=f"held_out/{name}.jsonl", root=".") for name in names)
    return EvalMixture(name=mixture, sources=sources, swapped=swapped)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What a stage has of its own at released size, beside its groups."""

    # Source -> share, of the loss or in the stages of `BY_DOCUMENTS` of documents; each is a manifest
    # DATA_ROOT/NAME.jsonl.
    shares: dict[str, float]
    steps: int  # to which the learning rate decays
    warmup_steps: int
    patches: int  # what a row holds of each at most (`Budgets`); in long rows in proportion to their tokens
    audio_frames: int
    audio_targets: int
    text_targets: int = 0  # 0: no limit, and logits for every token
    # What is tried on documents beyond a budget; interleaved ones are always cut in chunks.
    oversize: tuple[OversizePolicy, ...] = ("chunk_text",)


_RECIPES: dict[Stage, _Recipe] = {
    "image_text_1": _Recipe(
        shares={"image_captions": 1.0},
        steps=4000,
        warmup_steps=100,
        patches=28672,
        audio_frames=256,
        audio_targets=256,
    ),
    "image_text_2": _Recipe(
        # 40 % is pure text.
        shares={
            "interleaved": 0.12,
            "image_captions": 0.16,
            "ocr": 0.12,
            "charts": 0.08,
            "image_qa": 0.12,
            "text": 0.4,
        },
        steps=20000,
        warmup_steps=500,
        patches=28672,
        audio_frames=256,
        audio_targets=256,
    ),
    "image_audio_text_1": _Recipe(
        shares={"asr": 0.4, "tts": 0.3, "intlv": 0.15, "itts": 0.15},
        steps=10000,
        warmup_steps=200,
        patches=4096,
        audio_frames=4096,
        audio_targets=2048,
    ),
    "image_audio_text_2": _Recipe(
        # Audio 0.2, image 0.4, text 0.4.
        shares={
            "asr": 0.07,
            "tts": 0.05,
            "aqa": 0.04,
            "intlv": 0.02,
            "itts": 0.02,
            "interleaved": 0.1,
            "image_captions": 0.12,
            "ocr": 0.08,
            "charts": 0.04,
            "image_qa": 0.06,
            "text": 0.4,
        },
        steps=20000,
        warmup_steps=500,
        patches=24576,
        audio_frames=4096,
        audio_targets=2048,
    ),
    "omni_64k": _Recipe(
        shares={
            "image_audio_text": 0.15,
            "video_audio_text": 0.15,
            "video_captions": 0.08,
            "video_qa": 0.07,
            "asr": 0.05,
            "tts": 0.04,
            "aqa": 0.03,
            "intlv": 0.02,
            "itts": 0.02,
            "interleaved": 0.06,
            "image_captions": 0.06,
            "ocr": 0.04,
            "charts": 0.02,
            "image_qa": 0.04,
            "text": 0.17,
        },
        steps=10000,
        warmup_steps=200,
        patches=131072,
        audio_frames=16384,
        audio_targets=8192,
        text_targets=20480,
    ),
    "sft": _Recipe(
        shares={"sft_text": 0.3, "sft_image": 0.2, "sft_video": 0.1, "sft_audio": 0.2, "sft_omni": 0.2},
        steps=3000,
        warmup_steps=100,
        patches=131072,
        audio_frames=16384,
        audio_targets=8192,
        text_targets=20480,
        oversize=("split", "chunk_text"),
    ),
}
# Patches of the largest image: what a media shard of a long row should have room for.
_LARGEST_IMAGE = 16384


def stage_run(
    stage: Stage,
    *,
    model: str = "baichuan_omni_7b",
    machine: str = RELEASED_MACHINE,
    shares: Mapping[str, float] | None = None,
    home: str = "",
) -> RunConfig:
    """Returns a stage's run, from the weights of the stage before it.

    Rows have 8192 tokens, 128 a step, or in the stages of `BY_DOCUMENTS` 65536, 16 a step: 2**20 tokens either way.
    Where a machine holds no row of 65536, rows are as long as it holds, and more of them a step; where its chips hold
    more than 2**20 tokens at a time, rows are more and steps fewer, for the same tokens in all.

    Args:
        stage: its groups and learning rates are `stage_groups`.
        model: a variant of `OmniConfig`, or the path of a Hugging Face config.json.
        machine: one of `MACHINES`, which decides mesh, accumulation, and what has to give where the model is large.
        shares: source -> its share of the mixture; a manifest DATA_ROOT/NAME.jsonl each. Of the loss, or in the stages
            of `BY_DOCUMENTS` of documents. None: the recipe's.
        home: the folder or URL (`gs://BUCKET/omni`) that holds `data/omni`, `weights/omni` and the `runs` of the stages
            before; "" is where the command is started.

    Raises:
        ConfigError: an unknown stage, model or machine.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    recipe, number, by_documents = _RECIPES[stage], STAGES.index(stage), stage in BY_DOCUMENTS
    # How the rows lie on the machine; budgets of a shortened row are shortened alike.
    fit, longest = fit_of(model, machine), 65536 if by_documents else 8192
    layout = layout_of(fit, machine, longest)
    shorter = longest // layout.tokens
    patches = recipe.patches // shorter
    # As many tokens as the recipe reads, in updates of another size.
    fewer = step_tokens_of(fit, machine) // STEP_TOKENS
    steps, warmup_steps = recipe.steps // fewer, recipe.warmup_steps // fewer
    # Parts of a row's patches: each with room for the largest image, as many as the mesh splits rows in at least.
    media_shards = max(layout.mesh.context, patches // _LARGEST_IMAGE if by_documents else 1)
    data = DataConfig(
        root=path_in(home, "data/omni"),
        mixture=mixture_of(shares or recipe.shares, oversize={"interleaved": ("chunk",)}),
        weights_by="documents" if by_documents else "trainable",
        oversize=recipe.oversize,
        rows=layout.rows,
        budgets=Budgets(
            tokens=layout.tokens,
            patches=patches,
            audio_frames=recipe.audio_frames // shorter,
            audio_targets=recipe.audio_targets // shorter,
            text_targets=recipe.text_targets // shorter,
        ),
        audio_tokenizer=path_in(home, "weights/omni"),
        media_shards=media_shards,
        # One conversation of 64k tokens costs nearly twice what a row of short ones does.
        order_window=16 if by_documents else 1,
    )
    return RunConfig(
        name=stage,
        model=model,
        machine=machine,
        mesh=layout.mesh,
        data=data,
        optimizer=OptimizerConfig(
            groups=stage_groups(stage, language=fit.language),
            warmup_steps=warmup_steps,
            decay_steps=steps,
            moments_dtype=fit.moments,
        ),
        compute=ComputeConfig(remat=fit.remat, mlp_chunk=1024, loss_chunk=fit.loss_chunk, attention_block="auto"),
        train=TrainConfig(
            steps=steps,
            accumulate=layout.accumulate,
            # Between a weight for every target and one for every document: long text does not drown out short answers.
            document_weighting="sqrt" if by_documents else "token",
            # A frame to predict counts as much as a text target.
            audio_full_ratio=1.0,
        ),
        checkpoint=CheckpointConfig(
            every=500, init_from=path_in(home, f"runs/{STAGES[number - 1]}" if number else "weights/omni")
        ),
    )
