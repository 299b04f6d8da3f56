"""Codes of the sound that a prompt holds as mel windows, by the branch `audio_encoder`."""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.tokenize import WindowEncoder
from baichuan_omni_jax.generation.events import Prompt


class PromptAudioEncoder:
    """`AudioEncoderBranch` for prompts, on `mesh`. One program for each of the lengths that windows are padded to."""

    def __init__(self, tokenizer: AudioEncoderBranch, mesh: Mesh):
        self._cfg = tokenizer.cfg
        # One window a device: a prompt has few, and empty places cost as much as taken ones.
        self._encode = WindowEncoder(tokenizer, mesh, windows_per_device=1)

    @property
    def programs(self) -> int:
        """Compiled so far."""
        return count_programs(self._encode.encode)

    def encode(self, prompt: Prompt) -> Int32[np.ndarray, "a q"]:
        """The prompt's `audio_codes`, those of its `mels` filled in. Call it with the mesh set."""
        codes = np.array(prompt.audio_codes, np.int32)
        windows = ((place, mel.T) for place, mel in zip(prompt.mel_places, prompt.mels, strict=True))
        for place, frames in self._encode(windows):
            codes[place : place + len(frames)] = frames
        return codes


def count_programs(jitted: Any) -> int:
    """How many programs a jitted function was compiled to; JAX has no public name for it."""
    return jitted._cache_size()
