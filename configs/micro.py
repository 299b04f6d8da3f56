"""The smallest run that still has every part: for tests of faults, resuming and meshes. It learns nothing worth having.

    python launch/tpu_pretrain.py --config configs/micro.py --workdir runs/micro

Two short rows a step, eight steps, a checkpoint every second one. Each budget holds the sample's longest document.
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
)

# Shares of documents.
MIXTURE = {"text": 1.0, "image": 2.0, "video": 1.0, "audio": 3.0, "omni": 2.0}


def get_config() -> RunConfig:
    return RunConfig(
        name="micro",
        model="tiny",
        data=DataConfig(
            root="data/sample",
            sample=True,
            mixture=tuple(
                SourceConfig(name=name, manifest=f"{name}.jsonl", weight=weight) for name, weight in MIXTURE.items()
            ),
            rows=2,
            budgets=Budgets(tokens=256, patches=256, audio_frames=128, audio_targets=96),
            workers=0,
            max_bad_fraction=0.01,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="vision", pattern=r"vision\.", learning_rate=1e-3),
                GroupConfig(name="language and audio", pattern=r"(llm|audio_head)\.", learning_rate=3e-3),
            ),
            warmup_steps=2,
            decay_steps=8,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=128, attention_block=128),
        train=TrainConfig(steps=8, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=2),
    )
