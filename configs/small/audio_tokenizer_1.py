"""The audio tokenizer's first run: words and digit strings, and a reader of transcripts that learns with it.

    python launch/tpu_pretrain.py --config configs/small/audio_tokenizer_1.py --workdir runs/audio_tokenizer_1_small

By name: `--config audio_tokenizer_1_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small_audio import small_tokenizer


def get_config() -> RunConfig:
    return small_tokenizer(1)
