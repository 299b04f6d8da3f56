"""The audio tokenizer at released size: Whisper-large encoder, eight codebooks, mel decoder, a frozen 7B LM.

    python launch/tpu_pretrain.py --config configs/audio_tokenizer.py --workdir runs/audio_tokenizer \\
        --multihost --set data.root=DATA_ROOT

Sized for 8 chips of v5p; on v5e:4x8 add `--set mesh.fsdp=32`. The encoder and the LM come from released weights
(`launch/convert_weights.py`), the encoder also from Whisper's (docs/how-to/audio.md). Sources, in the shares of the
paper's hours (arXiv:2502.17239): ASR, spoken questions, translation of speech, text and speech in turns; the data are
yours: docs/how-to/data.md. A document has at most `mel_windows` clips: cut those of text and speech in turns so, or
raise it.
"""

from baichuan_omni_jax.config import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    GroupConfig,
    MeshConfig,
    OptimizerConfig,
    QuantizerConfig,
    RunConfig,
    TokenizerTrainConfig,
    TrainConfig,
    mixture_of,
)

STEPS = 100000
# In which the share of quantized clips grows to all, and the noise on the choice of codes falls to none.
GROWING = STEPS // 5
# Thousands of hours.
HOURS = {"asr": 135.0, "aqa": 11.0, "s2tt": 9.0, "intlv": 52.0}
WEIGHTS = "weights/omni"


def get_config() -> RunConfig:
    return RunConfig(
        name="audio_tokenizer",
        task="audio_tokenizer",
        branches=("audio_encoder", "audio_decoder", "transcript_adapter", "llm"),
        mesh=MeshConfig(fsdp=8),
        data=DataConfig(
            root="data/speech",
            mixture=mixture_of(HOURS),
            weights_by="tokens",  # 12.5 a second of audio: the nearest to hours
            rows=32,
            budgets=Budgets(tokens=2048, patches=0, audio_frames=1504, audio_targets=1504, mel_windows=4),
            mel_frames=(504, 1000, 2000, 3000),
            workers=8,
        ),
        optimizer=OptimizerConfig(
            groups=(
                GroupConfig(name="language model", pattern=r"llm\.", learning_rate=None),
                GroupConfig(name="encoder", pattern=r"audio_encoder\.encoder\.", learning_rate=1e-5),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=2e-4),
            ),
            warmup_steps=1000,
            decay_steps=STEPS,
        ),
        compute=ComputeConfig(remat="full", mlp_chunk=0, loss_chunk=512),
        train=TrainConfig(steps=STEPS),
        checkpoint=CheckpointConfig(
            every=1000,
            init_from=f"audio_encoder={WEIGHTS},llm={WEIGHTS},audio_decoder=random,transcript_adapter=random",
        ),
        tokenizer=TokenizerTrainConfig(
            commitment_start=0.05,
            quantizer=QuantizerConfig(
                decay=0.99,
                shrink=0.01,
                restart_after=200,
                init_steps=20,
                temperature=(0.05, 0.0),
                temperature_steps=GROWING,
                quantized_steps=GROWING,
            ),
        ),
    )
