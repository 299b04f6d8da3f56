"""The flow-matching decoder at released size, on what a frozen tokenizer makes of speech; 24 kHz mel.

    python launch/tpu_pretrain.py --config configs/flow_matching.py --workdir runs/flow_matching \\
        --multihost --set data.root=DATA_ROOT

Sized for 8 chips of v5p; on v5e:4x8 add `--set mesh.fsdp=32`. Starts from runs/audio_tokenizer. The speech should be
recorded at 24 kHz or more: what lies above the recording's own band is learned as silence.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    mixture_of,
)

STEPS = 200000
TOKENIZER = "runs/audio_tokenizer"


def get_config() -> RunConfig:
    return RunConfig(
        name="flow_matching",
        task="flow_matching",
        branches=("audio_encoder", "audio_decoder", "flow"),
        mesh=MeshConfig(fsdp=8),
        data=DataConfig(
            root="data/speech",
            mixture=mixture_of({"tts": 0.5, "pure_audio": 0.5}),
            rows=64,
            budgets=Budgets(tokens=2048, patches=0, audio_frames=1504, audio_targets=1504, mel_windows=4),
            mel_frames=(504, 1000, 2000, 3000),
            workers=8,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="flow", pattern=r"flow\.", learning_rate=1e-4),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=None),
            ),
            warmup_steps=1000,
            decay_steps=STEPS,
        ),
        compute=ComputeConfig(remat="full"),
        train=TrainConfig(steps=STEPS),
        checkpoint=CheckpointConfig(
            every=1000, init_from=f"audio_encoder={TOKENIZER},audio_decoder={TOKENIZER},flow=random"
        ),
    )
