"""Stage image_audio_text_1 on the tiny model: audio embeddings and audio head learn from speech.

    python launch/tpu_pretrain.py --config configs/image_audio_text_1_tiny.py --workdir runs/image_audio_text_1_tiny

The released sizes are in `configs/image_audio_text_1.py`;
`launch/run_stages.py` runs all six, each from the one before.
"""

from baichuan_omni_jax.config import RunConfig, tiny_stage


def get_config() -> RunConfig:
    return tiny_stage("image_audio_text_1")
