"""Stage omni: everything at once, with dialogues.

    python launch/tpu_pretrain.py --config configs/small/omni.py --workdir runs/omni_small

By name: `--config omni_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small import small_stage


def get_config() -> RunConfig:
    return small_stage("omni")
