"""Stage image_audio_text_1: the model hears through the reader's embeddings and begins to speak.

    python launch/tpu_pretrain.py --config configs/small/image_audio_text_1.py --workdir runs/image_audio_text_1_small

By name: `--config image_audio_text_1_small`.
`baichuan-omni recipe small` makes the data and runs all of them in order, each from what it needs.
"""

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.small import small_stage


def get_config() -> RunConfig:
    return small_stage("image_audio_text_1")
