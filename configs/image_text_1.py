"""Stage image_text_1: the visual projector and the rows of special tokens learn from captions; all else is frozen.

    python launch/tpu_pretrain.py --config configs/image_text_1.py --workdir runs/image_text_1 \\
        --multihost --set data.root=DATA_ROOT

Starts from converted weights (a released checkpoint, or Qwen2.5 with a vision tower). Released ones know the special
tokens: add `--set train.special_token_rows=false`. Sized for 64 chips (v5p:4x4x4);
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

# Shares of the loss; each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
    "image_captions": 1.0,
}


def get_config() -> RunConfig:
    return RunConfig(
        name="image_text_1",
        model="baichuan_omni_7b",
        mesh=MeshConfig(fsdp=64),
        data=DataConfig(
            root="data/omni",
            mixture=mixture_of(SHARES),
            weights_by="trainable",
            rows=128,
            budgets=Budgets(tokens=8192, patches=28672, audio_frames=256, audio_targets=256),
            workers=8,
            audio_tokenizer="weights/omni",
        ),
        optimizer=OptimizerConfig(groups=stage_groups("image_text_1"), warmup_steps=100, decay_steps=4000),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        # A frame to predict counts as much as a text target.
        train=TrainConfig(steps=4000, audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=500, init_from="weights/omni"),
    )
