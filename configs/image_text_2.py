"""Stage image_text_2: language model and projector learn at 1e-5, the vision tower at 1e-6; 40 % of the loss is that of
pure text.

    python launch/tpu_pretrain.py --config configs/image_text_2.py --workdir runs/image_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_text_1.
The 7B model on 64 chips (v5p:4x4x4); others by `--set model=omni_0b5 --set machine=v5e:2x4` (docs/how-to/stages.md).
The data are yours: docs/how-to/data.md. `--set home=gs://BUCKET/omni` reads them, the weights and the stage before
from there.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4", home: str = "") -> RunConfig:
    return stage_run("image_text_2", model=model, machine=machine, home=home)
