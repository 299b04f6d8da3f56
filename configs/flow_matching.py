"""The flow-matching decoder at released size, on what a frozen tokenizer makes of speech; 24 kHz mel.

    python launch/tpu_pretrain.py --config configs/flow_matching.py --workdir runs/flow_matching \\
        --multihost --set data.root=DATA_ROOT

For 8 chips of v5p; others by `--set model=omni_0b5 --set machine=v5e:2x4`. Starts from runs/audio_tokenizer. The speech
should be recorded at 24 kHz or more: what lies above the recording's own band is learned as silence.
"""

from baichuan_omni_jax.config import RunConfig, flow_matching_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:2x2x2", home: str = "") -> RunConfig:
    return flow_matching_run(model=model, machine=machine, home=home)
