"""Stage image_audio_text_1: audio embeddings, audio head and the rows of special tokens learn from speech; all else is
frozen.

    python launch/tpu_pretrain.py --config configs/image_audio_text_1.py --workdir runs/image_audio_text_1 \\
        --multihost --set data.root=DATA_ROOT

Starts from stage image_text_2; of released weights add `--set train.special_token_rows=false`, as they know the special
tokens. Sized for 64 chips (v5p:4x4x4);
`launch/preflight.py` predicts what other slices take. The data are yours: docs/how-to/data.md.
"""

from baichuan_omni_jax.config import RunConfig, stage_run

# Shares of the loss (of all text and frames that are trained on); each is a manifest DATA_ROOT/NAME.jsonl.
SHARES = {
    "asr": 0.4,
    "tts": 0.3,
    "intlv": 0.15,
    "itts": 0.15,
}


def get_config() -> RunConfig:
    return stage_run(
        "image_audio_text_1", SHARES, steps=10000, warmup_steps=200, patches=4096, audio_frames=4096, audio_targets=2048
    )
