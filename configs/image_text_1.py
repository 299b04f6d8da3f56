"""Stage image_text_1: the visual projector and the rows of special tokens learn from captions; all else is frozen.

    python launch/tpu_pretrain.py --config configs/image_text_1.py --workdir runs/image_text_1 \\
        --multihost --set data.root=DATA_ROOT

Starts from converted weights (a released checkpoint, or Qwen2.5 with a vision tower). Released ones know the special
tokens: add `--set train.special_token_rows=false`. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of the loss; each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
    "image_captions": 1.0,
}


def get_config() -> RunConfig:
    return stage_run(
        "image_text_1", SHARES, steps=4000, warmup_steps=100, patches=28672, audio_frames=256, audio_targets=256
    )
