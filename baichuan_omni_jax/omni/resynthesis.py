"""Sound through its codes and back: ears, quantiser, mel decoder, flow matching, vocoder. One window at a time."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int32

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.sound_targets import flow_target
from baichuan_omni_jax.flow.sampler import sample_mel
from baichuan_omni_jax.vocoder.griffin_lim import griffin_lim
from baichuan_omni_jax.vocoder.model import draw_noise


@dataclass(frozen=True)
class Resynthesised:
    """Codes (g, levels) of a window, its 24 kHz mel (s, mels) and the waveform at `rate` Hz."""

    codes: Int32[np.ndarray, "g q"]
    mel: Float[np.ndarray, "s mels"]
    wave: Float[np.ndarray, " t"]
    rate: int


class Voice:
    """The branches `audio_encoder`, `audio_decoder`, `flow` and, when there is one, `vocoder`; else Griffin-Lim."""

    def __init__(self, branches: dict[str, nnx.Module], cfg: OmniConfig, seed: int = 0):
        self._branches, self._cfg, self._key = branches, cfg, jax.random.key(seed)
        self._encode = jax.jit(lambda model, mel, lengths: model.encode(mel, lengths))
        self._to_mel = jax.jit(_to_mel)
        self._to_wave = jax.jit(_to_wave)

    @property
    def vocoder(self) -> str:
        """`hift` or `griffin_lim`: what makes the waveform."""
        return "hift" if "vocoder" in self._branches else "griffin_lim"

    def encode(self, mel: Float[np.ndarray, "f mels"]) -> Int32[np.ndarray, "g q"]:
        """Codes of the log mel of one window of at most 30 s."""
        lengths = jnp.asarray([len(mel)], jnp.int32)
        codes, valid = self._encode(self._branches["audio_encoder"], jnp.asarray(mel)[None], lengths)
        return np.asarray(codes[0])[np.asarray(valid[0])]

    def speak(self, codes: Int32[np.ndarray, "g q"]) -> Resynthesised:
        """The mel and the waveform of one window's codes. The same codes give the same sound."""
        mel, lengths = self._to_mel(self._branches, jnp.asarray(codes)[None], self._key)
        if self.vocoder == "hift":
            wave = self._to_wave(self._branches["vocoder"], mel, lengths, self._key)[0]
        mel = np.asarray(mel[0, : int(lengths[0])], np.float32)
        settings = flow_target(self._cfg.flow)
        samples = len(mel) * settings.hop
        wave = np.asarray(wave)[:samples] if self.vocoder == "hift" else griffin_lim(mel, settings)
        return Resynthesised(codes, mel, wave, settings.rate)


def _to_mel(branches: dict[str, Any], codes, key):
    quantised = branches["audio_encoder"].quantizer.decode(codes)
    decoded = branches["audio_decoder"](quantised, jnp.full(1, codes.shape[1], jnp.int32))
    shape = *decoded.hidden.shape[:2], branches["flow"].cfg.in_channels
    noise = jax.random.normal(key, shape)
    return sample_mel(branches["flow"], decoded.hidden, decoded.hidden_lengths, noise), decoded.hidden_lengths


def _to_wave(vocoder, mel, lengths, key):
    return vocoder(mel, lengths, *draw_noise(key, 1, mel.shape[1], vocoder.cfg))
