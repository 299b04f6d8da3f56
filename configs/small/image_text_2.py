"""Stage image_text_2: charts, videos and text besides.

    python launch/tpu_pretrain.py --config configs/small/image_text_2.py --workdir runs/image_text_2_small

By name: `--config image_text_2_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small import small_stage


def get_config() -> RunConfig:
    return small_stage("image_text_2")
