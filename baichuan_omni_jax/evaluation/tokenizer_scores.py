"""Scores of an audio tokenizer over clips, window by window: what the numbers of an evaluation are made of."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Int32

from baichuan_omni_jax.audio.mel_training import MelTarget
from baichuan_omni_jax.audio.tokenize import mel_buckets
from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.config.mel_targets import decoded_target
from baichuan_omni_jax.evaluation.audio_scores import code_sums, tokenizer_means
from baichuan_omni_jax.omni.audio_tokenizer_model import Clips


class TokenizerScores:
    """Takes windows through `audio_encoder` and `audio_decoder` and sums what `code_sums` counts.

    Windows are padded to one of four lengths (`mel_buckets`), so that at most four programs are compiled. `settings`
    are those of the mel that comes back, which is compared frame by frame. Use it with the branches' mesh set.
    """

    def __init__(self, branches: Mapping[str, nnx.Module], cfg: OmniConfig) -> None:
        self._branches = {name: branches[name] for name in ("audio_encoder", "audio_decoder")}
        self._cfg, self._sums = cfg, {}
        self.settings = decoded_target(cfg.post_net)
        self._through = jax.jit(_through)

    def __call__(
        self, mel: Float[np.ndarray, "f mels"], target: Float[np.ndarray, "s bands"]
    ) -> tuple[Int32[np.ndarray, "g q"], Float32[np.ndarray, "t bands"]]:
        """Codes and the decoded mel of one window; `target` is its own mel at `settings`."""
        size = next(size for size in mel_buckets(self._cfg.audio) if size >= len(mel))
        frames = self.settings.frames(
            size * self._cfg.audio.hop_length * self.settings.rate // self._cfg.audio.sampling_rate
        )
        clips = Clips(*_slot(mel, size))
        sums, codes, valid, made, length = self._through(
            self._branches, clips, MelTarget(*_slot(target[:frames], frames))
        )
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)
        return np.asarray(codes[0])[np.asarray(valid[0])], np.asarray(made[0, : int(length[0])], np.float32)

    def means(self) -> dict[str, float]:
        """Those of `tokenizer_means`, and by the codebooks' sizes `bits_per_second_at_most`. Empty without clips."""
        if not self._sums:
            return {}
        audio = self._cfg.audio
        most = audio.code_rate * sum(np.log2(size) for size in audio.codebook_sizes)
        return tokenizer_means(self._sums, audio.code_rate) | {"bits_per_second_at_most": float(most)}


def _slot(mel: Float[np.ndarray, "f mels"], size: int):
    padded = np.zeros((1, size, mel.shape[1]), np.float32)
    padded[0, : len(mel)] = mel
    return jnp.asarray(padded), jnp.asarray([len(mel)], jnp.int32)


def _through(branches, clips: Clips, target: MelTarget):
    sums, made = code_sums(branches["audio_encoder"], branches["audio_decoder"], clips, target)
    return sums, made.codes, made.valid, made.decoded.refined_mel, made.decoded.mel_lengths
