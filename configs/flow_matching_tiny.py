"""The flow-matching decoder at toy size on the sample data's speech, in minutes on two CPU cores.

    python launch/tpu_pretrain.py --config configs/flow_matching_tiny.py --workdir runs/flow_matching_tiny

Starts from the tokenizer of configs/audio_tokenizer_tiny.py, which stays as it is.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    EvalMixture,
    FlowTrainConfig,
    GroupConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)

STEPS = 1200
TOKENIZER = "runs/audio_tokenizer_tiny"


def get_config() -> RunConfig:
    return RunConfig(
        name="flow_matching_tiny",
        model="tiny",
        task="flow_matching",
        branches=("audio_encoder", "audio_decoder", "flow"),
        data=DataConfig(
            root="data/sample",
            sample=True,
            mixture=(SourceConfig(name="audio", manifest="audio.jsonl"),),
            rows=2,
            # Held-out documents have images, which take room and which nothing reads.
            budgets=Budgets(tokens=384, patches=256, audio_frames=256, audio_targets=256, mel_windows=4),
            mel_frames=(256,),
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="flow", pattern=r"flow\.", learning_rate=1e-3),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=None),
            ),
            warmup_steps=20,
            decay_steps=STEPS,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", attention_block=128),
        train=TrainConfig(steps=STEPS, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(
            every=500, keep=1, init_from=f"audio_encoder={TOKENIZER},audio_decoder={TOKENIZER},flow=random"
        ),
        eval=EvalConfig(
            every=300,
            steps=8,
            # No clip of omni.jsonl is in audio.jsonl.
            mixtures=(EvalMixture(name="speech", sources=(SourceConfig(name="omni", manifest="omni.jsonl"),)),),
        ),
        flow=FlowTrainConfig(ema=0.99),
    )
