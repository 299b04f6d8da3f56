"""The audio tokenizer's second run: sentences, from the first run's weights.

    python launch/tpu_pretrain.py --config configs/small/audio_tokenizer_2.py --workdir runs/audio_tokenizer_2_small

By name: `--config audio_tokenizer_2_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small_audio import small_tokenizer


def get_config() -> RunConfig:
    return small_tokenizer(2)
