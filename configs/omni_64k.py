"""Stage omni_64k: rows of 65536 tokens over all modalities; everything but the vision tower learns at 4e-6.

    python launch/tpu_pretrain.py --config configs/omni_64k.py --workdir runs/omni_64k \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_audio_text_2. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of documents; each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
    "image_audio_text": 0.15,
    "video_audio_text": 0.15,
    "video_captions": 0.08,
    "video_qa": 0.07,
    "asr": 0.05,
    "tts": 0.04,
    "aqa": 0.03,
    "intlv": 0.02,
    "itts": 0.02,
    "interleaved": 0.06,
    "image_captions": 0.06,
    "ocr": 0.04,
    "charts": 0.02,
    "image_qa": 0.04,
    "text": 0.17,
}


def get_config() -> RunConfig:
    return stage_run("omni_64k", SHARES, steps=10000, warmup_steps=200)
