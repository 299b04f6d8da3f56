"""Stage sft: instruction pairs over all mixes of modalities; everything but the vision tower learns at 2e-6 (ours: the
report gives no rate).

    python launch/tpu_pretrain.py --config configs/sft.py --workdir runs/sft \\
        --multihost --set data.root=DATA_ROOT

Starts from stage omni_64k. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of documents; each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
    "sft_text": 0.3,
    "sft_image": 0.2,
    "sft_video": 0.1,
    "sft_audio": 0.2,
    "sft_omni": 0.2,
}


def get_config() -> RunConfig:
    return stage_run("sft", SHARES, steps=3000, warmup_steps=100, oversize=("split", "chunk_text"))
