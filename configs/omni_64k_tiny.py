"""Stage omni_64k on the tiny model: everything but the tower learns from all modalities mixed.

    python launch/tpu_pretrain.py --config configs/omni_64k_tiny.py --workdir runs/omni_64k_tiny

The released sizes are in `configs/omni_64k.py`;
`launch/run_stages.py` runs all six, each from the one before.
"""

from baichuan_omni_jax.config import RunConfig, tiny_stage


def get_config() -> RunConfig:
    return tiny_stage("omni_64k")
