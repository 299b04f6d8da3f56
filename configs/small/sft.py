"""Stage sft: the same at rates that fall to nothing.

    python launch/tpu_pretrain.py --config configs/small/sft.py --workdir runs/sft_small

By name: `--config sft_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small import small_stage


def get_config() -> RunConfig:
    return small_stage("sft")
