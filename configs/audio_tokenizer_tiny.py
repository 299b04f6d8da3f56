"""The audio tokenizer at toy size on the sample data's speech: encoder and mel decoder in minutes on two CPU cores.

    python launch/tpu_pretrain.py --config configs/audio_tokenizer_tiny.py --workdir runs/audio_tokenizer_tiny

Encoder, quantizer and decoder learn from random weights. The frozen language model of the transcripts is that of
configs/tiny.py (`--set checkpoint.init_from=llm=runs/tiny`), else a frozen random one, which still wants features
that differ between sounds.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    EvalMixture,
    GroupConfig,
    OptimizerConfig,
    QuantizerConfig,
    RunConfig,
    SourceConfig,
    TokenizerTrainConfig,
    TrainConfig,
)

STEPS = 600
GROWING = STEPS // 3


def get_config() -> RunConfig:
    return RunConfig(
        name="audio_tokenizer_tiny",
        model="tiny",
        task="audio_tokenizer",
        branches=("audio_encoder", "audio_decoder", "transcript_adapter", "llm"),
        data=DataConfig(
            root="data/sample",
            sample=True,
            mixture=(SourceConfig(name="audio", manifest="audio.jsonl"),),
            rows=2,
            # Held-out documents have images, which take room and which nothing reads.
            budgets=Budgets(tokens=384, patches=256, audio_frames=256, audio_targets=256, mel_windows=4),
            mel_frames=(256, 512),
            workers=1,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="language model", pattern=r"llm\.", learning_rate=None),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=2e-3),
            ),
            warmup_steps=20,
            decay_steps=STEPS,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=256, attention_block=128),
        train=TrainConfig(steps=STEPS, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=200, keep=1),
        eval=EvalConfig(
            every=100,
            steps=12,
            # No clip of omni.jsonl is in audio.jsonl.
            mixtures=(EvalMixture(name="speech", sources=(SourceConfig(name="omni", manifest="omni.jsonl"),)),),
        ),
        tokenizer=TokenizerTrainConfig(
            transcript=0.1,
            commitment_start=0.05,
            quantizer=QuantizerConfig(
                decay=0.9,
                shrink=0.01,
                restart_after=20,
                init_steps=10,
                temperature=(0.05, 0.0),
                temperature_steps=GROWING,
                quantized_share=0.1,
                quantized_steps=GROWING,
            ),
        ),
    )
