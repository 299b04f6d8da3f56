"""A small but complete omni model on real photos, speech and video, in minutes on two CPU cores.

    python launch/tpu_pretrain.py --config configs/tiny.py --workdir runs/tiny

Everything trains from random weights, on the sample data set that the run builds at `data/sample` by itself.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GroupConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    sample_eval,
)

# Shares of the loss: of all text and frames that are trained on.
MIXTURE = {"text": 2.0, "image": 2.0, "video": 1.0, "audio": 3.0, "omni": 2.0}


def get_config() -> RunConfig:
    return RunConfig(
        name="tiny",
        model="tiny",
        data=DataConfig(
            root="data/sample",
            sample=True,
            mixture=tuple(
                SourceConfig(name=name, manifest=f"{name}.jsonl", weight=weight) for name, weight in MIXTURE.items()
            ),
            weights_by="trainable",
            rows=4,
            # More than 1024 tokens of this mixture bring, so that tokens are the budget that binds.
            budgets=Budgets(tokens=1024, patches=1024, audio_frames=384, audio_targets=288),
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="vision", pattern=r"vision\.", learning_rate=1e-3),
                GroupConfig(name="language and audio", pattern=r"(llm|audio_head)\.", learning_rate=3e-3),
            ),
            warmup_steps=20,
            decay_steps=150,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=256, attention_block=128),
        train=TrainConfig(steps=150, frozen_dtype="float32", audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=100),
        eval=sample_eval(every=50, steps=2, items=16),
    )
