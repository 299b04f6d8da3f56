"""Stage image_text_2 on the tiny model: language model, projector and tower learn from images and text.

    python launch/tpu_pretrain.py --config configs/image_text_2_tiny.py --workdir runs/image_text_2_tiny

The released sizes are in `configs/image_text_2.py`;
`launch/run_stages.py` runs all six, each from the one before.
"""

from baichuan_omni_jax.config import RunConfig, tiny_stage


def get_config() -> RunConfig:
    return tiny_stage("image_text_2")
