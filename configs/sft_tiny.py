"""Stage sft on the tiny model: everything but the tower learns from conversations over all modalities.

    python launch/tpu_pretrain.py --config configs/sft_tiny.py --workdir runs/sft_tiny

The released sizes are in `configs/sft.py`;
`launch/run_stages.py` runs all six, each from the one before.
"""

from baichuan_omni_jax.config import RunConfig, tiny_stage


def get_config() -> RunConfig:
    return tiny_stage("sft")
