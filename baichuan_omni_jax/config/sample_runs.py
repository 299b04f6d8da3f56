"""Runs on the offline sample data: the recipe's stages at toy size, and how runs on it are evaluated."""

from collections.abc import Sequence

from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from baichuan_omni_jax.config.stages import BY_DOCUMENTS, Stage, held_out_of, mixture_of, stage_groups

# The abilities that the sample data has held-out documents of, a manifest `held_out/NAME.jsonl` each.
SAMPLE_ABILITIES = ("text_qa", "image_qa", "video_qa", "asr", "aqa", "image_aqa", "tts")


def sample_eval(
    *, every: int, steps: int = 1, items: int = 16, abilities: Sequence[str] = SAMPLE_ABILITIES
) -> EvalConfig:
    """Returns the evaluation of a run on the sample data: losses, own media against others', and what it can do.

    Args:
        every: steps between losses.
        steps: of held-out rows.
        items: questions of each ability, after the last step.
        abilities: some of `SAMPLE_ABILITIES`.
    """
    mixture = held_out_of(abilities, swapped=True)
    return EvalConfig(
        every=every, steps=steps, mixtures=(mixture,), abilities=("held_out",), ability_items=items, sample=True
    )


# What each stage reads of the sample data: shares as at released size, and by what the rates for 7 B are multiplied.
_TINY: dict[Stage, tuple[dict[str, float], float]] = {
    "image_text_1": ({"image": 1.0, "video": 0.25}, 1.0),
    "image_text_2": ({"image": 0.45, "video": 0.15, "text": 0.4}, 100.0),
    "image_audio_text_1": ({"audio": 1.0}, 10.0),
    "image_audio_text_2": ({"audio": 0.2, "image": 0.3, "video": 0.1, "text": 0.4}, 100.0),
    "omni_64k": ({"audio": 0.2, "image": 0.2, "video": 0.1, "text": 0.3, "omni": 0.2}, 250.0),
    "sft": ({"omni": 0.5, "audio": 0.25, "image": 0.25}, 500.0),
}


def tiny_stage(stage: Stage, *, steps: int = 12) -> RunConfig:
    """Returns a stage's run on the tiny model and the offline sample data; all six take minutes on a laptop."""
    (shares, scale), by_documents = _TINY[stage], stage in BY_DOCUMENTS
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
        eval=sample_eval(every=steps, items=8),
    )
