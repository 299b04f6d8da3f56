"""Recipes: chains of training runs as tables, from random weights to a model one can talk to.

A row is a configuration and where its first weights come from. `baichuan-omni recipe NAME` runs a table; another recipe
is another entry of `RECIPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# What a target is about: the score itself, what own media save of the loss in nats a target, or what of the score has
# been lost since a stage.
Measure = Literal["accuracy", "cer", "media_gain", "lost"]
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class RecipeStage:
    """One training run of a recipe. `{NAME}` stands for the workdir of an earlier stage of that name."""

    name: str  # the run's, and its folder's below the recipe's workdir
    config: str = ""  # a file, or a configuration known by name; "": that of `name`
    parents: Mapping[str, str] = field(default_factory=dict)  # key of the run -> a value with `{NAME}` in it
    step_seconds: float = 1.0  # a step on two CPU cores: what time is told by until steps have been measured


@dataclass(frozen=True, kw_only=True)
class Target:
    """What an ability is to reach after the last stage."""

    measure: Measure
    bound: float
    since: str = ""  # of `lost`: the stage that it is measured from

    def is_met(self, value: float) -> bool:
        """Whether a value is as good as the bound."""
        # Two points of a hundred items lost are two points, however floats subtract.
        more = self.measure in ("accuracy", "media_gain")
        return value >= self.bound - _ROUNDING if more else value <= self.bound + _ROUNDING


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A chain of runs on one data set, and what is to come of it."""

    stages: tuple[RecipeStage, ...]
    data: str  # the folder of the data set, unless another one is named
    tokenizer: str = ""  # of the data set, the text tokenizer of all runs; "": as each run says
    build: str = ""  # what makes the data set: `python -m MODULE FOLDER`; "": it must be there
    chat: str = ""  # the checkpoint to talk to, by branch, with `{NAME}`; "": the last stage
    targets: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)  # by ability


# The curriculum of the audio tokenizer: single words and digits, then sentences.
_HEARS = "audio_tokenizer_2_small"
_SEES = "image_text_2_small"
# Its codes are those of every run with sound, and its reader of transcripts is the first language model.
_CODES = {"data.audio_tokenizer": f"{{{_HEARS}}}"}


def _after(stage: str) -> dict[str, str]:
    return {"checkpoint.init_from": f"{{{stage}}}", **_CODES}


def _sees(accuracy: float) -> tuple[Target, ...]:
    """Of abilities that look: right answers, which the stages with sound leave, and pictures that matter."""
    return (Target(measure="accuracy", bound=accuracy), *_KEPT, Target(measure="media_gain", bound=0.5))


_KEPT = (Target(measure="lost", bound=0.02, since=_SEES),)
_GAIN = Target(measure="media_gain", bound=1.0)


SMALL = Recipe(
    data="data/small",
    tokenizer="tokenizer.json",
    build="data_pipelines.small",
    stages=(
        RecipeStage(name="audio_tokenizer_1_small", step_seconds=0.8),
        RecipeStage(name=_HEARS, parents={"checkpoint.init_from": "{audio_tokenizer_1_small}"}, step_seconds=0.8),
        RecipeStage(
            name="flow_matching_small",
            parents={"checkpoint.init_from": f"audio_encoder={{{_HEARS}}},audio_decoder={{{_HEARS}}},flow=random"},
            step_seconds=0.7,
        ),
        RecipeStage(
            name="image_text_1_digits_small",
            parents={"checkpoint.init_from": f"llm={{{_HEARS}}},vision=random"},
            step_seconds=0.4,
        ),
        RecipeStage(
            name="image_text_1_small",
            parents={"checkpoint.init_from": "{image_text_1_digits_small}"},
            step_seconds=0.6,
        ),
        RecipeStage(name=_SEES, parents={"checkpoint.init_from": "{image_text_1_small}"}, step_seconds=0.6),
        RecipeStage(
            name="image_audio_text_1_small",
            parents={
                "checkpoint.init_from": f"vision={{{_SEES}}},llm={{{_SEES}}},audio_head=random",
                "checkpoint.audio_embeddings_from": f"{{{_HEARS}}}",
                **_CODES,
            },
            step_seconds=0.6,
        ),
        RecipeStage(name="image_audio_text_2_small", parents=_after("image_audio_text_1_small"), step_seconds=0.8),
        RecipeStage(name="omni_small", parents=_after("image_audio_text_2_small"), step_seconds=0.8),
        RecipeStage(name="sft_small", parents=_after("omni_small"), step_seconds=0.8),
    ),
    chat=(
        "llm={sft_small},vision={sft_small},audio_head={sft_small},audio_encoder={sft_small},"
        f"audio_decoder={{{_HEARS}}},flow={{flow_matching_small}}"
    ),
    targets={
        "digit": _sees(0.97),
        **dict.fromkeys(("color", "shape", "place", "motion"), _sees(0.9)),
        **dict.fromkeys(("tallest_bar", "bar_value", "count", "order", "facts", "reading"), _KEPT),
        "hear_numbers": (Target(measure="cer", bound=0.03), _GAIN),
        "hear_sentences": (Target(measure="cer", bound=0.1), _GAIN),
        "hear_question": (Target(measure="accuracy", bound=0.85),),
        "speak_numbers": (Target(measure="cer", bound=0.15),),
        "speak_sentences": (Target(measure="cer", bound=0.15),),
    },
)

RECIPES: dict[str, Recipe] = {"small": SMALL}
