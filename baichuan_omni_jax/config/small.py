"""The stages of the small recipe: the whole report in miniature, from random weights, on two CPU cores.

Nothing is pretrained here, so groups and rates are not the released recipe's: what a stage adds learns at full rate,
what the stages before have taught at a lower one.
"""

from dataclasses import dataclass

from baichuan_omni_jax.branches import BRANCHES, BranchName
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    GroupConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from baichuan_omni_jax.config.stages import LANGUAGE, SPEECH, held_out_of, mixture_of
from baichuan_omni_jax.errors import ConfigError

VISION = BRANCHES["vision"].pattern()
# What the data has held-out questions of, a manifest `held_out/NAME.jsonl` each.
IMAGE_ABILITIES = ("digit", "color", "shape", "place", "tallest_bar", "bar_value", "motion")
TEXT_ABILITIES = ("count", "order", "facts", "reading")
SPEECH_ABILITIES = ("hear_numbers", "hear_sentences", "speak_numbers", "speak_sentences")
OMNI_ABILITIES = (*SPEECH_ABILITIES, "hear_question", "hear_order")
_ALL: tuple[BranchName, ...] = ("vision", "llm", "audio_head")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """What a stage of the small recipe has of its own."""

    shares: dict[str, float]  # source -> share of documents; a manifest DATA_ROOT/NAME.jsonl each
    rates: tuple[tuple[str, str, float | None], ...]  # groups: name, pattern, peak learning rate (None: frozen)
    steps: int
    final_fraction: float  # of the peak rate, at the last step: a stage that goes on at its rate ends high
    budgets: Budgets  # of a row
    rows: int = 4  # some sixty documents a step: with half of them no shape is known after twice the steps
    warmup_steps: int = 30
    branches: tuple[BranchName, ...] = ("vision", "llm")
    abilities: tuple[str, ...] = IMAGE_ABILITIES  # that are measured at the stage's end


# As many patches as tokens of such documents need; no audio.
_IMAGE_ROWS = Budgets(tokens=512, patches=768, audio_frames=1, audio_targets=1)

_RECIPES: dict[str, _Recipe] = {
    "image_text_1_digits": _Recipe(
        # One ability opens the way from image to answer in a hundred steps, and what comes later takes it. All at once
        # wait for each other: after as many documents none had left chance.
        shares={"digits": 1.0},
        rates=(("vision", VISION, 1.5e-3), ("language", LANGUAGE, 1.5e-3)),
        steps=120,
        final_fraction=1.0,
        budgets=_IMAGE_ROWS,
        rows=2,
        warmup_steps=20,
        abilities=("digit",),
    ),
    "image_text_1": _Recipe(
        shares={"digits": 0.6, "pictures": 3.4},
        rates=(("vision", VISION, 1.5e-3), ("language", LANGUAGE, 1.5e-3)),
        steps=700,
        final_fraction=0.5,
        budgets=_IMAGE_ROWS,
        warmup_steps=20,
        abilities=("digit", "color", "shape", "place"),
    ),
    "image_text_2": _Recipe(
        shares={"digits": 1.0, "pictures": 1.5, "charts": 1.5, "motion": 1.5, "text": 1.5},
        rates=(("vision", VISION, 1.5e-3), ("language", LANGUAGE, 1.5e-3)),
        steps=1200,
        final_fraction=0.03,
        budgets=_IMAGE_ROWS,
        warmup_steps=20,
        abilities=(*IMAGE_ABILITIES, *TEXT_ABILITIES),
    ),
    "image_audio_text_1": _Recipe(
        # All that the model sees and reads stays in its rows: what was left out, videos, it forgot in 150 steps.
        shares={
            **{"words": 0.5, "numbers": 1.0, "sentences": 1.0, "speech": 4.0},
            **{"digits": 0.7, "pictures": 0.7, "charts": 0.6, "motion": 0.6, "text": 0.6},
        },
        rates=(("vision", VISION, None), ("language", LANGUAGE, 1e-3), ("speech", SPEECH, 2e-3)),
        steps=400,
        final_fraction=0.5,
        budgets=Budgets(tokens=512, patches=384, audio_frames=384, audio_targets=256),
        branches=_ALL,
        abilities=(*IMAGE_ABILITIES, *TEXT_ABILITIES, *SPEECH_ABILITIES),
    ),
    "image_audio_text_2": _Recipe(
        shares={
            **{"words": 0.7, "numbers": 1.0, "sentences": 1.0, "speech": 3.0, "spoken_questions": 2.0},
            **{"digits": 1.0, "pictures": 1.0, "charts": 1.0, "motion": 0.7, "text": 1.0},
        },
        rates=(("vision", VISION, None), ("language", LANGUAGE, 1e-3), ("speech", SPEECH, 2e-3)),
        steps=500,
        final_fraction=0.5,
        budgets=Budgets(tokens=640, patches=384, audio_frames=384, audio_targets=256),
        branches=_ALL,
        abilities=(*IMAGE_ABILITIES, *TEXT_ABILITIES, *OMNI_ABILITIES),
    ),
    "omni": _Recipe(
        shares={
            **{"words": 0.7, "numbers": 0.7, "sentences": 0.8},
            **{"speech": 2.5, "spoken_questions": 3.0, "dialogue": 0.7},
            **{"digits": 1.6, "pictures": 1.2, "charts": 1.4, "motion": 1.0, "text": 1.0},
        },
        rates=(("vision", VISION, 5e-4), ("language", LANGUAGE, 1e-3), ("speech", SPEECH, 2e-3)),
        steps=900,
        final_fraction=0.2,
        budgets=Budgets(tokens=640, patches=512, audio_frames=384, audio_targets=256),
        branches=_ALL,
        abilities=(*IMAGE_ABILITIES, *TEXT_ABILITIES, *OMNI_ABILITIES),
    ),
    "sft": _Recipe(
        shares={
            # Short clips of words, or all that is short is heard as digits.
            **{"words": 1.5, "numbers": 0.6, "sentences": 0.7},
            **{"speech": 2.0, "spoken_questions": 2.5, "dialogue": 1.5},
            # Digits and charts lose first where the rest gains, so their shares are the largest of what is seen.
            **{"digits": 1.6, "pictures": 1.2, "charts": 1.6, "motion": 1.0, "text": 1.2},
        },
        rates=(("vision", VISION, 2e-4), ("language", LANGUAGE, 3e-4), ("speech", SPEECH, 5e-4)),
        steps=400,
        final_fraction=0.02,
        budgets=Budgets(tokens=640, patches=512, audio_frames=384, audio_targets=256),
        branches=_ALL,
        abilities=(*IMAGE_ABILITIES, *TEXT_ABILITIES, *OMNI_ABILITIES),
    ),
}
SMALL_STAGES = tuple(_RECIPES)


def small_stage(stage: str, *, model: str = "small") -> RunConfig:
    """Returns a stage's run on the small model and the data of `python -m data_pipelines.small`.

    Args:
        stage: one of the recipe's.
        model: another model of the same vocabulary.

    Raises:
        ConfigError: a stage that the small recipe does not have.
    """
    if stage not in _RECIPES:
        raise ConfigError(f"stage {stage!r} is not one of the small recipe's: {', '.join(_RECIPES)}")
    recipe = _RECIPES[stage]
    return RunConfig(
        name=f"{stage}_small",
        model=model,
        branches=recipe.branches,
        data=DataConfig(
            root="data/small",
            tokenizer="data/small/tokenizer.json",
            mixture=mixture_of(recipe.shares),
            rows=recipe.rows,
            budgets=recipe.budgets,
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=tuple(
                GroupConfig(name=name, pattern=pattern, learning_rate=rate) for name, pattern, rate in recipe.rates
            ),
            warmup_steps=recipe.warmup_steps,
            decay_steps=recipe.steps,
            final_fraction=recipe.final_fraction,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=512, attention_block=128),
        train=TrainConfig(steps=recipe.steps, frozen_dtype="float32", audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=recipe.steps, keep=1),
        eval=_small_eval(recipe.abilities, recipe.steps),
    )


def _small_eval(abilities: tuple[str, ...], every: int) -> EvalConfig:
    """Returns the evaluation after `every` steps: held-out losses, with other media too, and answers."""
    mixture = held_out_of(abilities, swapped=True)
    return EvalConfig(every=every, steps=4, mixtures=(mixture,), abilities=("held_out",), ability_items=100)
