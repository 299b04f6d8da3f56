"""Stage image_text_2: language model and projector learn at 1e-5, the vision tower at 1e-6; 40 % of the loss is that of
pure text.

    python launch/tpu_pretrain.py --config configs/image_text_2.py --workdir runs/image_text_2 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_text_1. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of the loss (of all that is trained on); each is a manifest DATA_ROOT/NAME.jsonl. 40 % is pure text.
SHARES = {
    "interleaved": 0.12,
    "image_captions": 0.16,
    "ocr": 0.12,
    "charts": 0.08,
    "image_qa": 0.12,
    "text": 0.4,
}


def get_config() -> RunConfig:
    return stage_run(
        "image_text_2", SHARES, steps=20000, warmup_steps=500, patches=28672, audio_frames=256, audio_targets=256
    )
