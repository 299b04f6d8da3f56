"""Stage omni_64k: rows of 65536 tokens over all modalities; everything but the vision tower learns at 4e-6.

    python launch/tpu_pretrain.py --config configs/omni_64k.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_2.
The 7B model on 64 chips (v5p:4x4x4); others by `--set model=omni_0b5 --set machine=v5e:2x4` (docs/how-to/stages.md).
The data are yours: docs/how-to/data.md. `--set home=gs://BUCKET/omni` reads them, the weights and the stage before
from there.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4", home: str = "") -> RunConfig:
    return stage_run("omni_64k", model=model, machine=machine, home=home)
