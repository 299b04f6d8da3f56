"""Stage image_audio_text_2: everything but the vision tower learns at 1e-5 from sound, pictures and text.

    python launch/tpu_pretrain.py --config configs/image_audio_text_2.py --workdir runs/image_audio_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_1. Sized for 64 chips (v5p:4x4x4);
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

# Shares of the loss (of all text and frames that are trained on): audio 0.2, image 0.4, text 0.4; each is a manifest
# DATA_ROOT/NAME.jsonl.
SHARES = {
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
}


def get_config() -> RunConfig:
    return RunConfig(
        name="image_audio_text_2",
        model="baichuan_omni_7b",
        mesh=MeshConfig(fsdp=64),
        data=DataConfig(
            root="data/omni",
            mixture=mixture_of(SHARES, oversize={"interleaved": ("chunk",)}),
            weights_by="trainable",
            rows=128,
            budgets=Budgets(tokens=8192, patches=24576, audio_frames=4096, audio_targets=2048),
            workers=8,
            audio_tokenizer="weights/omni",
        ),
        optimizer=OptimizerConfig(groups=stage_groups("image_audio_text_2"), warmup_steps=500, decay_steps=20000),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        # A frame to predict counts as much as a text target.
        train=TrainConfig(steps=20000, audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=500, init_from="runs/image_audio_text_1"),
    )
