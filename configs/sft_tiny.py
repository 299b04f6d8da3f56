"""Stage sft on the tiny model: everything but the tower learns from conversations over all modalities.

    python launch/tpu_pretrain.py --config configs/sft_tiny.py --workdir runs/sft_tiny

The released sizes are in `configs/sft.py`;
`launch/run_stages.py` runs all six, each from the one before.
"""

from baichuan_omni_jax.config import RunConfig, tiny_stage


def get_config() -> RunConfig:
    # The released rates are for 7 B parameters: times 500 here.
    return tiny_stage("sft", {"omni": 0.5, "audio": 0.25, "image": 0.25}, scale=500.0)
