"""Stage omni_64k: rows of 65536 tokens over all modalities; everything but the vision tower learns at 4e-6.

    python launch/tpu_pretrain.py --config configs/omni_64k.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_2. Sized for 64 chips (v5p:4x4x4) and the 7B model; for others `--set machine=v5e:2x4
--set model=omni_0b5` (docs/how-to/stages.md). Mixture and budgets are `config/stages.py`'s: a copy of this file may give
`stage_run` its own `shares`. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4") -> RunConfig:
    return stage_run("omni_64k", model=model, machine=machine)
