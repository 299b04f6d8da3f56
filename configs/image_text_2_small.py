"""Stage image_text_2 of the small recipe: charts, motion and text join what it sees.

    python launch/tpu_pretrain.py --config configs/image_text_2_small.py --workdir runs/image_text_2_small

Its data is written by `python -m data_pipelines.small data/small`; the released sizes are in `configs/image_text_2.py`.
"""

from baichuan_omni_jax.config import RunConfig, small_stage


def get_config() -> RunConfig:
    return small_stage("image_text_2")
