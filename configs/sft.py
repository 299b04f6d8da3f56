"""Stage sft: instruction pairs over all mixes of modalities; everything but the vision tower learns at 2e-6 (ours: the
report gives no rate).

    python launch/tpu_pretrain.py --config configs/sft.py --workdir runs/sft \\
        --multihost --set data.root=DATA_ROOT

Starts from stage omni_64k.
The 7B model on 64 chips (v5p:4x4x4); others by `--set model=omni_0b5 --set machine=v5e:2x4` (docs/how-to/stages.md).
The data are yours: docs/how-to/data.md. `--set home=gs://BUCKET/omni` reads them, the weights and the stage before
from there.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4", home: str = "") -> RunConfig:
    return stage_run("sft", model=model, machine=machine, home=home)
