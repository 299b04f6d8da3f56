"""The language model alone at 64k on 64 chips: what a step costs in memory, beside other trainers of its size.

    python launch/preflight.py --config configs/llm_64k_probe.py --topology v5p:4x4x4

AdamW with fp32 master weights on every parameter, full remat, 16 rows of 65536 tokens: one row per group of 4 chips.
It is compiled, not run: it names no data.
"""

from baichuan_omni_jax.config import (
    Budgets,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="llm_64k_probe",
        branches=("llm",),
        mesh=MeshConfig(fsdp=16, context=4),
        data=DataConfig(rows=16, budgets=Budgets(tokens=65536, patches=0, audio_frames=0, audio_targets=0)),
        compute=ComputeConfig(remat="full", loss_chunk=512, mlp_chunk=1024),
    )
