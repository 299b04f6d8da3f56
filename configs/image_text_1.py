"""Stage image_text_1: the visual projector and the rows of special tokens learn from captions; all else is frozen.

    python launch/tpu_pretrain.py --config configs/image_text_1.py --workdir runs/image_text_1 \\
        --multihost --set data.root=DATA_ROOT

Starts from converted weights: a released checkpoint (`convert to-jax`), or Qwen2.5 with a vision tower (`convert
from-parts`, docs/how-to/train-from-qwen.md). Released ones know the special tokens: add
`--set train.special_token_rows=false`.
The 7B model on 64 chips (v5p:4x4x4); others by `--set model=omni_0b5 --set machine=v5e:2x4` (docs/how-to/stages.md).
The data are yours: docs/how-to/data.md. `--set home=gs://BUCKET/omni` reads them, the weights and the stage before
from there.
"""

from baichuan_omni_jax.config import RunConfig, stage_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:4x4x4", home: str = "") -> RunConfig:
    return stage_run("image_text_1", model=model, machine=machine, home=home)
