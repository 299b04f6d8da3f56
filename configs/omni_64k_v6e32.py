"""Stage omni_64k on 32 chips of TPU v6e (v6e:4x8): the same model, rows and rates, 4 rows at a time and 16 a step.

    python launch/tpu_pretrain.py --config configs/omni_64k_v6e32.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT
"""

from dataclasses import replace
from pathlib import Path

from baichuan_omni_jax.config import MeshConfig, RunConfig, load_run_config


def get_config() -> RunConfig:
    run = load_run_config(Path(__file__).with_name("omni_64k.py"))
    return replace(run, mesh=MeshConfig(fsdp=4, context=8), train=replace(run.train, accumulate=4))
