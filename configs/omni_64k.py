"""Stage omni_64k: rows of 65536 tokens over all modalities; everything but the vision tower learns at 4e-6.

    python launch/tpu_pretrain.py --config configs/omni_64k.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_2. Sized for 64 chips (v5p:4x4x4);
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

# Shares of documents; each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
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
}


def get_config() -> RunConfig:
    return RunConfig(
        name="omni_64k",
        model="baichuan_omni_7b",
        mesh=MeshConfig(fsdp=16, context=4),
        data=DataConfig(
            root="data/omni",
            mixture=mixture_of(SHARES, oversize={"interleaved": ("chunk",)}),
            rows=16,
            budgets=Budgets(tokens=65536, patches=131072, audio_frames=16384, audio_targets=8192),
            workers=8,
            audio_tokenizer="weights/omni",
            # Pictures of up to 16384 patches, on any mesh with context x tensor of 1, 2, 4 or 8.
            media_shards=8,
            # One conversation of 64k tokens costs nearly twice what a row of short ones does.
            order_window=16,
        ),
        optimizer=OptimizerConfig(groups=stage_groups("omni_64k"), warmup_steps=200, decay_steps=10000),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        # Between a weight for every target and one for every document: long text does not drown out short answers.
        train=TrainConfig(steps=10000, document_weighting="sqrt", audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=500, init_from="runs/image_audio_text_2"),
    )
