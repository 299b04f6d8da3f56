"""Stage image_audio_text_2: everything but the vision tower learns at 1e-5 from audio, images and text.

    python launch/tpu_pretrain.py --config configs/image_audio_text_2.py --workdir runs/image_audio_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_1. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of the loss (of all text and frames that are trained on): audio 0.2, image 0.4, text 0.4; each is a manifest
# DATA_ROOT/NAME.jsonl.
SHARES = {
    "asr": 0.07,
    "tts": 0.05,
    "aqa": 0.04,
    "intlv": 0.02,
    "itts": 0.02,
    "interleaved": 0.1,
    "image_captions": 0.12,
    "ocr": 0.08,
    "charts": 0.04,
    "image_qa": 0.06,
    "text": 0.4,
}


def get_config() -> RunConfig:
    return stage_run(
        "image_audio_text_2",
        SHARES,
        steps=20000,
        warmup_steps=500,
        patches=24576,
        audio_frames=4096,
        audio_targets=2048,
    )
