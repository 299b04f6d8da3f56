"""Stage omni_64k on 8 chips of TPU v5p (v5p:2x2x2): the same model, rows and rates, 2 rows at a time and 16 a step.

    python launch/tpu_pretrain.py --config configs/omni_64k_v5p8.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT
"""

from dataclasses import replace
from pathlib import Path

from baichuan_omni_jax.config import MeshConfig, RunConfig, load_run_config


def get_config() -> RunConfig:
    run = load_run_config(Path(__file__).with_name("omni_64k.py"))
    return replace(run, mesh=MeshConfig(fsdp=2, context=4), train=replace(run.train, accumulate=8))
