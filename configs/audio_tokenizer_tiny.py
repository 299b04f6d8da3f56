"""The audio tokenizer at toy size on the sample data's speech: encoder and mel decoder in minutes on two CPU cores.

    python launch/tpu_pretrain.py --config configs/audio_tokenizer_tiny.py --workdir runs/audio_tokenizer_tiny

Encoder, quantizer and decoder learn from random weights. The frozen language model of the transcripts is that of
configs/tiny.py (`--set checkpoint.init_from=llm=runs/tiny`), else a frozen random one, which still wants features
that differ between sounds.
"""

from baichuan_omni_jax.config import RunConfig, tiny_audio_tokenizer


def get_config() -> RunConfig:
    return tiny_audio_tokenizer()
