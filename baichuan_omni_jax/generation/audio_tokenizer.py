"""The audio tokenizer for use on its own: a waveform of any rate to codes, and codes back to audio."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Float32, Int, Int32

from baichuan_omni_jax.audio.encoder import WindowEncoder
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.generation.speech_decoder import SpeechDecoder
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.media.features import clip_windows, log_mel

BRANCHES = ("audio_encoder", "audio_decoder", "flow", "vocoder")


class AudioTokenizer:
    """Encodes audio as 12.5 frames of residual codes a second, and decodes them (arXiv:2502.17239).

    tokenizer = AudioTokenizer.from_checkpoint("runs/tokenizer")
    codes = tokenizer.encode(wave, 44100)  # (frames, 8) int32
    wave, rate = tokenizer.decode(codes)  # 24000 Hz

    Needs the branch `audio_encoder`. With `audio_decoder` there is `decode_mel`, with `flow` also `decode`, whose
    waveform a `vocoder` makes, or else Griffin and Lim's iteration. Works on one device, the first of this host, and
    needs no mesh. The same codes and `seed` give the same waveform.
    """

    def __init__(self, branches: Mapping[str, Any], cfg: OmniConfig, *, seed: int = 0):
        """Takes modules by branch name, as `branches.py` builds them, and the sizes that they were built with.

        Raises ConfigError where `audio_encoder` is missing.
        """
        if "audio_encoder" not in branches:
            raise ConfigError(f"an audio tokenizer needs the branch audio_encoder; there are {', '.join(branches)}")
        self.cfg, self.branches, self._seed = cfg, dict(branches), seed
        self._mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        self._encoder: WindowEncoder | None = None
        self._speaker: SpeechDecoder | None = None
        self._decoder = jax.jit(lambda quantizer, decoder, codes, lengths: decoder(quantizer.decode(codes), lengths))

    @classmethod
    def from_checkpoint(cls, checkpoint: str, *, seed: int = 0) -> "AudioTokenizer":
        """Loads what a checkpoint has of the four branches of audio.

        Args:
            checkpoint: a checkpoint or a run's workdir (its newest good step), or `branch=DIR,...`; may be a URL.
            seed: of the noise that `decode` starts from.

        Raises:
            ConfigError: no `audio_encoder` there, or a damaged file.
        """
        loaded = load_for_generation(checkpoint, needed=("audio_encoder",), only=BRANCHES)
        return cls(loaded.branches, loaded.config, seed=seed)

    @property
    def code_rate(self) -> float:
        """Code frames a second: 12.5."""
        return self.cfg.audio.code_rate

    def encode(
        self, wave: Float[np.ndarray, " t"] | Int[np.ndarray, " t"] | Float[np.ndarray, "t c"], rate: int
    ) -> Int32[np.ndarray, "g q"]:
        """Encodes a clip of any length, in windows of at most 30 s.

        Args:
            wave: samples in ±1, or whole numbers of their type's range; channels in the second dim are averaged.
            rate: samples a second; others than 16000 are resampled.

        Returns:
            Codes (frames, levels), level q below `cfg.audio.codebook_sizes[q]`. Less than 80 ms has no frame.

        Raises:
            ValueError: samples of another shape, or a rate that is not positive.
        """
        audio = self.cfg.audio
        samples = self._samples(wave, rate)
        # Cut as the data pipelines cut: a clip gets the codes that it would have in training.
        windows = clip_windows(len(samples), audio)
        if not windows:
            return np.zeros((0, audio.levels), np.int32)
        mels = ((w.index, log_mel(samples[w.start : w.start + w.samples], audio)) for w in windows)
        with jax.set_mesh(self._mesh):
            if self._encoder is None:
                encoder = jax.device_put(self.branches["audio_encoder"], NamedSharding(self._mesh, PartitionSpec()))
                # One window a batch: a clip has few, and empty places cost as much as taken ones.
                self._encoder = WindowEncoder(encoder, self._mesh, windows_per_device=1)
            # Windows come back by length, not in their order.
            codes = dict(self._encoder(mels))
        return np.concatenate([codes[w.index] for w in windows])

    def decode_mel(self, codes: Int[np.ndarray, "g q"]) -> Float32[np.ndarray, "s mels"]:
        """Decodes codes to the audio decoder's refined log mel, (frames, 80 mels) at 62.5 Hz, of 16 kHz audio.

        Raises ConfigError without the branch `audio_decoder`, ValueError on codes that are not the codebooks'.
        """
        if "audio_decoder" not in self.branches:
            raise ConfigError("a mel needs the branch audio_decoder")
        codes, sizes = np.asarray(codes), np.array(self.cfg.audio.codebook_sizes)
        if codes.ndim != 2 or codes.shape[1] != len(sizes) or ((codes < 0) | (codes >= sizes)).any():
            raise ValueError(f"codes {codes.shape}: expected (frames, {len(sizes)}), each below its codebook's size")
        codes = codes.astype(np.int32)
        if not len(codes):
            return np.zeros((0, self.cfg.post_net.num_mel_bins), np.float32)
        parts = self.branches["audio_encoder"].quantizer, self.branches["audio_decoder"]
        with jax.set_mesh(self._mesh):
            parts = jax.device_put(parts, NamedSharding(self._mesh, PartitionSpec()))
            # Not padded, so every length is a program of its own: good enough for looking at single clips.
            made = self._decoder(*parts, codes[None], np.array([len(codes)], np.int32))
        return np.asarray(made.refined_mel, np.float32)[0, : int(made.mel_lengths[0])]

    def decode(self, codes: Int[np.ndarray, "g q"]) -> tuple[Float32[np.ndarray, " t"], int]:
        """Decodes codes to a waveform in ±1 and its rate (24000 Hz), by flow matching and the vocoder.

        Raises ConfigError where `audio_decoder` or `flow` is missing, ValueError on codes that are not the codebooks'.
        """
        if self._speaker is None:
            self._speaker = SpeechDecoder(self.branches, self.cfg, seed=self._seed)
        spoken = self._speaker.speak(np.asarray(codes))
        return spoken.wave, spoken.rate

    def _samples(self, wave: np.ndarray, rate: int) -> Float32[np.ndarray, " t"]:
        """One channel in ±1 at the tokenizer's rate."""
        import soxr

        wave = np.asarray(wave)
        if not np.issubdtype(wave.dtype, np.floating) and not np.issubdtype(wave.dtype, np.signedinteger):
            raise ValueError(f"wave of {wave.dtype}: expected floating-point samples in ±1, or signed integers")
        if wave.ndim not in (1, 2) or rate <= 0:
            raise ValueError(
                f"wave {wave.shape} at {rate} Hz: expected samples (t,) or (t, channels) and a rate above 0"
            )
        if np.issubdtype(wave.dtype, np.integer):
            wave = wave.astype(np.float32) / -float(np.iinfo(wave.dtype).min)
        mono = wave.astype(np.float32) if wave.ndim == 1 else wave.mean(1, dtype=np.float32)
        return mono if rate == self.cfg.audio.sampling_rate else soxr.resample(mono, rate, self.cfg.audio.sampling_rate)
