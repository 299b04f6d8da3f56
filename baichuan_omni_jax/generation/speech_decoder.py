"""Codes to audio: audio decoder, flow matching, vocoder; a stretch of speech at once, or streamed while it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.audio.encoder import ResidualQuantizer
from baichuan_omni_jax.branches import SPEECH_BRANCHES
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.matching import sample_around
from baichuan_omni_jax.flow.model import ATTENTION_CHUNK, FlowDecoder
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.model import reach
from baichuan_omni_jax.vocoder.streaming import (
    GRIFFIN_LIM_REACH,
    HiftWindow,
    WaveStream,
    Window,
    griffin_lim,
    window_wave,
)

SECONDS = 0.010  # as in the released demos


class CrossFade:
    """The last `samples` of every piece wait for the next one, whose beginning lies over them."""

    def __init__(self, samples: int):
        self._samples, self._held = samples, np.zeros(0, np.float32)

    def push(self, piece: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " t"]:
        """What is ready once `piece` has come; an empty piece changes nothing."""
        if not len(piece):
            return piece
        wave = cross_faded(self._held, piece)
        kept = max(0, len(wave) - self._samples)
        self._held = wave[kept:]
        return wave[:kept]

    def close(self) -> Float32[np.ndarray, " t"]:
        """What waited. The next piece is then a first one."""
        rest, self._held = self._held, np.zeros(0, np.float32)
        return rest


def cross_faded(first: Float32[np.ndarray, " a"], second: Float32[np.ndarray, " b"]) -> Float32[np.ndarray, " t"]:
    """`first` running into `second` over all of the shorter: a + b - min(a, b) samples.

    >>> cross_faded(np.ones(4, np.float32), np.zeros(2, np.float32)).tolist()
    [1.0, 1.0, 0.75, 0.25]
    """
    n = min(len(first), len(second))
    rising = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / np.float32(max(n, 1))
    before = len(first) - n
    return np.concatenate([first[:before], first[before:] * (1 - rising) + second[:n] * rising, second[n:]])


WINDOW = 4


@dataclass(frozen=True)
class DecodedSpeech:
    """Codes (g, levels) of a stretch of speech, its mel (s, mels) and the waveform, both of `rate` Hz."""

    codes: Int32[np.ndarray, "g q"]
    mel: Float[np.ndarray, "s mels"]
    wave: Float[np.ndarray, " t"]
    rate: int


class Models(NamedTuple):
    """What makes mels of codes."""

    quantizer: ResidualQuantizer
    decoder: AudioDecoder
    flow: FlowDecoder


class SpeechDecoder:
    """Speaks codes by the branches `audio_encoder` (its codebooks), `audio_decoder`, `flow` and `vocoder`.

    Without a vocoder (HiFT) Griffin and Lim's iteration makes the waveform; `vocoder` says which: `hift`,
    `griffin_lim`. `rate` is 24000 Hz in released checkpoints. Works on one device, the first of this host, whatever the
    mesh in use; from any thread. The same codes and `seed` give the same audio. `compiles` counts programs: each is
    for 1, 2, 4, 6, 8, 12 … chunks of `chunk` code frames. A stream works chunk by chunk, of which flow matching sees
    the last `window` (best a power of two), the new one included. Raises ConfigError naming a branch that is missing.
    """

    def __init__(self, branches: Mapping[str, Any], cfg: OmniConfig, *, seed: int = 0, window: int = WINDOW):
        if missing := [name for name in SPEECH_BRANCHES if name not in branches]:
            raise ConfigError(f"speech needs the branch {missing[0]}; there are {', '.join(branches) or 'none'}")
        self.cfg, self.settings, self.window, self.compiles = cfg, flow_target(cfg.flow), window, 0
        self.rate = self.settings.rate
        self.vocoder = "hift" if "vocoder" in branches else "griffin_lim"
        self._mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        parts = branches["audio_encoder"].quantizer, branches["audio_decoder"], branches["flow"]
        self._models = Models(*self._placed(parts))
        self._hift = self._placed(branches["vocoder"]) if "vocoder" in branches else None
        # The noise of flow matching and of the vocoder's source: the same codes and seed give the same audio.
        with jax.set_mesh(self._mesh):
            self._keys = jax.random.split(jax.random.key(seed))
        self._guess, self._sample = self._compiled(guess), self._compiled(sample)
        self._window_wave = self._compiled(window_wave)
        # A chunk is what the chunked attention of flow matching sees at once, in whole code frames.
        states = self._models.decoder.dconv1.stride
        self.chunk = math.lcm(ATTENTION_CHUNK, states) // states
        self.frames = self.chunk * states  # mel frames of a chunk
        self.fade = round(SECONDS * self.rate)
        self.reach = reach(self._hift.cfg) if self._hift else GRIFFIN_LIM_REACH

    def stream(self) -> "SpeechStream":
        """Makes a new stream, with a state of its own; any number may be in use."""
        return SpeechStream(self)

    def speak(self, codes: Int32[np.ndarray, "g q"]) -> DecodedSpeech:
        """Decodes one stretch of speech as a whole. Raises ValueError on codes that are not the codebooks'."""
        codes = self.check_codes(codes)
        mel = (
            self.sample_mel(self.prenet_mel(codes), 0) if len(codes) else np.zeros((0, self.settings.mels), np.float32)
        )
        wave = self.windows(self.padded_frames(len(mel)))(mel, 0, True) if len(mel) else np.zeros(0, np.float32)
        return DecodedSpeech(codes, mel, wave, self.rate)

    def padded_frames(self, frames: int) -> int:
        """Mel frames of the program that is used for `frames`: the least number of chunks that holds them."""
        return _padded(frames, self.frames)

    def prenet_mel(self, codes: Int32[np.ndarray, "g q"]) -> Float32[np.ndarray, "s mels"]:
        """Computes the pre-net's mel, the guide of flow matching, of a stretch that ends with the last of `codes`.

        Where more follow, frames of all but the last code frame change only by the first GroupNorm, which counts all.
        """
        # One more than whole chunks: a stream reads one code frame ahead.
        padded = np.pad(codes, ((0, _padded(len(codes) - 1, self.chunk) + 1 - len(codes)), (0, 0)))
        mu, lengths = self._guess(self._models, padded[None], np.array([len(codes)], np.int32))
        return np.asarray(mu, np.float32)[0, : int(lengths[0])]

    def sample_mel(self, mu: Float32[np.ndarray, "s mels"], start: int) -> Float32[np.ndarray, "s mels"]:
        """Samples the mel around `mu`, which begins at frame `start` of its stretch."""
        padded = np.pad(mu, ((0, self.padded_frames(len(mu)) - len(mu)), (0, 0)))[None]
        mel = self._sample(self._models.flow, self._keys[0], padded, np.array([len(mu)], np.int32), np.int32(start))
        return np.asarray(mel)[0, : len(mu)]

    def windows(self, frames: int) -> Window:
        """Returns what makes the waveform of windows of at most `frames` mel frames of one stretch."""
        if self._hift is None:
            return lambda mel, start, last: griffin_lim(mel, self.settings)
        return HiftWindow(partial(self._window_wave, self._hift, self._keys[1]), self._hift.cfg, frames)

    def wave_stream(self) -> WaveStream:
        """Makes the waveform of one stretch whose mel comes chunk by chunk."""
        room = {"reach": self.reach, "hop": self.settings.hop, "fade": self.fade}
        return WaveStream(self.windows(WaveStream.longest(self.frames, **room)), **room)

    def check_codes(self, codes: Int32[np.ndarray, "g q"]) -> Int32[np.ndarray, "g q"]:
        """Returns `codes` as int32. Raises ValueError where the codebooks have no such codes."""
        sizes = self.cfg.audio.codebook_sizes
        if codes.ndim != 2 or codes.shape[1] != len(sizes):
            raise ValueError(f"codes {codes.shape}: expected (frames, {len(sizes)})")
        wrong = np.argwhere((codes < 0) | (codes >= np.array(sizes)))
        if len(wrong):
            frame, level = wrong[0]
            raise ValueError(
                f"code {codes[frame, level]} of frame {frame}, level {level}: the codebook has {sizes[level]}"
            )
        return codes.astype(np.int32)

    def _compiled(self, function):
        """`function` compiled for each shape, on the decoder's own mesh, and counted when it is."""

        def traced(*args):
            # Runs when JAX traces it, once for each shape: so it counts programs, not calls.
            self.compiles += 1
            return function(*args)

        jitted = jax.jit(traced)

        def run(*args):
            with jax.set_mesh(self._mesh):
                return jitted(*args)

        return run

    def _placed(self, module: Any) -> Any:
        return jax.device_put(module, NamedSharding(self._mesh, PartitionSpec()))


class SpeechStream:
    """Codes in as they are made, float32 samples out as soon as they are sure.

    The first samples of a stretch leave when `SpeechDecoder.chunk` + 1 code frames are there: whether there is another
    frame decides how its mel ends. Stretches follow each other with a cross-fade of 10 ms, whose length they share.
    """

    def __init__(self, decoder: SpeechDecoder):
        self._decoder, self._fade = decoder, CrossFade(decoder.fade)
        self._stretch: _Stretch | None = None
        self._closed = False

    def push(self, codes: Int32[np.ndarray, "n q"], last: bool = False) -> Float32[np.ndarray, " t"]:
        """The samples that are ready with these code frames; `last` ends the stretch, and the next begins a new one.

        Raises ValueError on codes that are not the codebooks' and on a closed stream.
        """
        if self._closed:
            raise ValueError("the stream of speech is closed")
        codes = self._decoder.check_codes(codes)
        if self._stretch is None:
            self._stretch = _Stretch(self._decoder)
        waves = self._stretch.push(codes, last)
        if last:
            self._stretch = None
        return np.concatenate([np.zeros(0, np.float32), *map(self._fade.push, waves)])

    def close(self) -> Float32[np.ndarray, " t"]:
        """The samples that were held back; the stretch ends if it has not. Closing twice gives nothing more."""
        if self._closed:
            return np.zeros(0, np.float32)
        ready = self.push(np.zeros((0, len(self._decoder.cfg.audio.codebook_sizes)), np.int32), last=True)
        self._closed = True
        return np.concatenate([ready, self._fade.close()])


class _Stretch:
    """One stretch of speech: its codes so far, and how many chunks of them have been spoken."""

    def __init__(self, decoder: SpeechDecoder):
        self._decoder, self._waves = decoder, decoder.wave_stream()
        self._codes, self._chunks = np.zeros((0, decoder.cfg.audio.levels), np.int32), 0

    def push(self, codes: Int32[np.ndarray, "n q"], last: bool) -> list[Float32[np.ndarray, " t"]]:
        """Waves that overlap by the decoder's `fade` samples."""
        self._codes = np.concatenate([self._codes, codes])
        waves = []
        while len(self._codes) > (self._chunks + 1) * self._decoder.chunk:
            waves.append(self._advance(last=False))
        if last and len(self._codes):
            waves.append(self._advance(last=True))
        return waves

    def _advance(self, last: bool) -> Float32[np.ndarray, " t"]:
        decoder, done, self._chunks = self._decoder, self._chunks, self._chunks + 1
        # The code frame after the chunk decides how it ends; with more, the audio would depend on how codes come.
        known = self._codes if last else self._codes[: self._chunks * decoder.chunk + 1]
        mu = decoder.prenet_mel(known)[: None if last else self._chunks * decoder.frames]
        # Of the past the last `window` chunks alone: work for a chunk does not grow with the stretch.
        start = max(0, self._chunks - decoder.window) * decoder.frames
        mel = decoder.sample_mel(mu[start:], start)
        # The new chunk alone goes on: what was sampled again of the past has been given out.
        return self._waves.push(mel[done * decoder.frames - start :], last)


def guess(
    models: Models, codes: Int32[Array, "1 g q"], lengths: Int32[Array, " 1"]
) -> tuple[Float[Array, "1 t mels"], Int32[Array, " 1"]]:
    """The pre-net's mel of the first `lengths` codes, and how many frames of it are valid."""
    decoded = models.decoder(models.quantizer.decode(codes), lengths)
    return models.flow.prenet(decoded.hidden, decoded.hidden_lengths), decoded.hidden_lengths


def sample(
    flow: FlowDecoder,
    key: PRNGKeyArray,
    mu: Float[Array, "1 t mels"],
    lengths: Int32[Array, " 1"],
    start: Int32[Array, ""],
) -> Float[Array, "1 t mels"]:
    """The 24 kHz mel around `mu`. Noise is each frame's own, wherever in its stretch `mu` starts."""

    # By place in the stretch: sampled again in the next window, a frame starts from the same noise.
    def noise(frame):
        return jax.random.normal(jax.random.fold_in(key, frame), mu.shape[2:])

    return sample_around(flow, mu, lengths, jax.vmap(noise)(start + jnp.arange(mu.shape[1]))[None])


def _padded(count: int, step: int) -> int:
    """The least of 1, 2, 4, 6, 8, 12, 16, 24 … steps that holds `count`: 120 in steps of 50 -> 200."""
    steps = -(-count // step)
    power = 1 << max(0, steps - 1).bit_length()
    return step * (power * 3 // 4 if power > 4 and steps <= power * 3 // 4 else power)
