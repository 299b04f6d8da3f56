"""Stage image_text_2: language model and projector learn at 1e-5, the vision tower at 1e-6; 40 % of the loss is that of
pure text.

    python launch/tpu_pretrain.py --config configs/image_text_2.py --workdir runs/image_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_text_1. Sized for 64 chips (v5p:4x4x4) and the 7B model; for others `--set machine=v5e:2x4
--set model=omni_0b5` (docs/how-to/stages.md). Mixture and budgets are `config/stages.py`'s: a copy of this file may give
`stage_run` its own `shares`. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4") -> RunConfig:
    return stage_run("image_text_2", model=model, machine=machine)
