"""The audio tokenizer at released size: Whisper-large encoder, eight codebooks, mel decoder, a frozen 7B LM.

    python launch/tpu_pretrain.py --config configs/audio_tokenizer.py --workdir runs/audio_tokenizer \\
        --multihost --set data.root=DATA_ROOT

For 8 chips of v5p; others by `--set model=omni_0b5 --set machine=v5e:2x4`. The encoder and the LM come from converted
weights (`weights/omni`), the encoder also from Whisper's (docs/how-to/audio.md). Sources, in the shares of the
paper's hours (arXiv:2502.17239): ASR, spoken questions, translation of speech, text and speech in turns; the data are
yours: docs/how-to/data.md. A document has at most `mel_windows` clips: cut those of text and speech in turns so, or
raise it.
"""

from baichuan_omni_jax.config import RunConfig, audio_tokenizer_run


def get_config(model: str = "baichuan_omni_7b", machine: str = "v5p:2x2x2", home: str = "") -> RunConfig:
    return audio_tokenizer_run(model=model, machine=machine, home=home)
