"""Stage image_text_2: language model and projector learn at 1e-5, the vision tower at 1e-6; 40 % of the loss is that of
pure text.

    python launch/tpu_pretrain.py --config configs/image_text_2.py --workdir runs/image_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_text_1. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` says what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    mixture_of,
    stage_groups,
)

# Shares of the loss (of all that is trained on); each is a manifest DATA_ROOT/NAME.jsonl. 40 % is pure text.
SHARES = {
    "interleaved": 0.12,
    "image_captions": 0.16,
    "ocr": 0.12,
    "charts": 0.08,
    "image_qa": 0.12,
    "text": 0.4,
}


def get_config() -> RunConfig:
    return RunConfig(
        name="image_text_2",
        model="baichuan_omni_7b",
        mesh=MeshConfig(fsdp=64),
        data=DataConfig(
            root="data/omni",
            mixture=mixture_of(SHARES, oversize={"interleaved": ("chunk",)}),
            weights_by="trainable",
            rows=128,
            budgets=Budgets(tokens=8192, patches=28672, audio_frames=256, audio_targets=256),
            workers=8,
            audio_tokenizer="weights/omni",
        ),
        optimizer=OptimizerConfig(groups=stage_groups("image_text_2"), warmup_steps=500, decay_steps=20000),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        # A frame to predict counts as much as a text target.
        train=TrainConfig(steps=20000, audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=500, init_from="runs/image_text_1"),
    )
