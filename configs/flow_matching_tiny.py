"""The flow-matching decoder at toy size on the sample data's speech, in minutes on two CPU cores.

    python launch/tpu_pretrain.py --config configs/flow_matching_tiny.py --workdir runs/flow_matching_tiny

Starts from the tokenizer of configs/audio_tokenizer_tiny.py, which stays as it is.
"""

from baichuan_omni_jax.config import RunConfig, tiny_flow_matching


def get_config() -> RunConfig:
    return tiny_flow_matching()
