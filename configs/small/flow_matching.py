"""The flow-matching decoder, on the model's own voice.

    python launch/tpu_pretrain.py --config configs/small/flow_matching.py --workdir runs/flow_matching_small

By name: `--config flow_matching_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small_audio import small_flow


def get_config() -> RunConfig:
    return small_flow()
