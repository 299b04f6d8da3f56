"""Stage image_text_1 of the small recipe: the whole model learns to see, from digits and shapes.

    python launch/tpu_pretrain.py --config configs/image_text_1_small.py --workdir runs/image_text_1_small

Its data is written by `python -m data_pipelines.small data/small`; the released sizes are in `configs/image_text_1.py`.
"""

from baichuan_omni_jax.config import RunConfig, small_stage


def get_config() -> RunConfig:
    return small_stage("image_text_1")
