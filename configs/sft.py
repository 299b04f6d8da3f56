"""Stage sft: instruction pairs over all mixes of modalities; everything but the vision tower learns at 2e-6 (ours: the
report gives no rate).

    python launch/tpu_pretrain.py --config configs/sft.py --workdir runs/sft \\
        --multihost --set data.root=DATA_ROOT

Starts from stage omni_64k. Sized for 64 chips (v5p:4x4x4);
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
    "sft_text": 0.3,
    "sft_image": 0.2,
    "sft_video": 0.1,
    "sft_audio": 0.2,
    "sft_omni": 0.2,
}


def get_config() -> RunConfig:
    return RunConfig(
        name="sft",
        model="baichuan_omni_7b",
        mesh=MeshConfig(fsdp=16, context=4),
        data=DataConfig(
            root="data/omni",
            mixture=mixture_of(SHARES),
            oversize=("split", "chunk_text"),
            rows=16,
            budgets=Budgets(tokens=65536, patches=131072, audio_frames=16384, audio_targets=8192),
            workers=8,
            audio_tokenizer="weights/omni",
            # Pictures of up to 16384 patches, on any mesh with context x tensor of 1, 2, 4 or 8.
            media_shards=8,
            # One conversation of 64k tokens costs nearly twice what a row of short ones does.
            order_window=16,
        ),
        optimizer=OptimizerConfig(groups=stage_groups("sft"), warmup_steps=100, decay_steps=3000),
        compute=ComputeConfig(remat="full", mlp_chunk=1024, loss_chunk=1024),
        # Between a weight for every target and one for every document: long text does not drown out short answers.
        train=TrainConfig(steps=3000, document_weighting="sqrt", audio_full_ratio=1.0),
        checkpoint=CheckpointConfig(every=500, init_from="runs/omni_64k"),
    )
