"""Held-out clips as they come back from their codes, at set steps of a run that trains on sound: what to hear and see.

The tokenizer's own mel (62.5 Hz, 16 kHz) is heard by Griffin-Lim, there is no vocoder for it. Flow matching samples the
24 kHz mel, which a HiFT vocoder (`eval.vocoder`) or Griffin-Lim makes audible.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, Float32, Int32, UInt8

from baichuan_omni_jax.audio.mel_training import SAME_RATE, MelTarget, frames_covered
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.mel_targets import decoded_target, flow_target, run_mel_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.audio_scores import SAMPLING_SEED
from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.omni.audio_tokenizer_model import clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.flow_matching_model import match_lengths
from baichuan_omni_jax.train.hosts import is_process_zero
from baichuan_omni_jax.train.input import TrainingData
from baichuan_omni_jax.train.mel_image import mel_image
from baichuan_omni_jax.train.mel_waves import MelWaves, check_vocoder
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState, saved_values

SOUND_TASKS = ("audio_tokenizer", "flow_matching")
Mels = Callable[[Arrays, Batch], tuple[MelTarget, MelTarget]]


@dataclass(frozen=True)
class SoundSamples:
    """Waveforms in ±1 with their rate in Hz, and pictures, by the names they are shown under."""

    waves: Mapping[str, tuple[Float32[np.ndarray, " t"], int]]
    pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]]


class Listening:
    """Makes the samples of the first `eval.audio_samples` clips of every mixture. `place` puts a batch on the mesh.

    Like an evaluation it changes nothing of what follows. Every host takes part; only the leading one makes sounds.
    """

    def __init__(self, run: RunConfig, spec: StepSpec, place: Callable, mixtures: Mapping[str, TrainingData]) -> None:
        self._run, self._setup, self._place, self._mixtures = run, spec, place, mixtures
        self._batches: dict[str, dict[str, np.ndarray]] = {}
        self._recorded_heard: set[str] = set()
        if not self.is_due(0):
            return
        omni = spec.task.omni
        made = {"audio_tokenizer": _tokenizer_mels, "flow_matching": _flow_mels}[run.task](spec, run)
        self._mels = jax.jit(made)
        self._settings = decoded_target(omni.post_net) if run.task == "audio_tokenizer" else flow_target(omni.flow)
        self._waves = self._recorded_waves = None
        if is_process_zero():
            self._waves = self._recorded_waves = MelWaves(self._settings, omni, run.eval.vocoder)
            recorded = next(iter(run_mel_targets(run, omni).values()))
            if recorded != self._settings:  # the first scale need not be the decoder's own
                self._recorded_waves = MelWaves(recorded, omni)
            self._ratio = self._settings.frame_rate / recorded.frame_rate

    def is_due(self, step: int) -> bool:
        """Before the first step, and after every `eval.audio_every`."""
        every = self._run.eval.audio_every
        return bool(self._mixtures) and every > 0 and step % every == 0

    @property
    def sentence(self) -> str:
        """What there is to hear, and what makes it."""
        return (
            f"held-out sound: TensorBoard has {self._run.eval.audio_samples} clips of each mixture every "
            f"{self._run.eval.audio_every} steps, {self._settings.rate} Hz by {self._waves.name}"
        )

    def __call__(self, state: TrainState) -> SoundSamples | None:
        """The samples; None on hosts that do not lead."""
        waves, pictures, parameters, rate = {}, {}, saved_values(self._setup, state), self._settings.rate
        for name in self._mixtures:
            recorded, made = jax.device_get(self._mels(parameters, self._place(self._first_batch(name))))
            if self._waves is None:
                continue
            for clip in np.flatnonzero(np.minimum(recorded.lengths, made.lengths)):
                ours, theirs = (mel.mel[clip, : mel.lengths[clip]] for mel in (made, recorded))
                # What has no code is neither heard nor seen: both are of the same span of the clip.
                theirs = theirs[: frames_covered(len(ours), self._ratio)]
                tag = f"eval/{name}/clip_{clip}"
                waves[f"{tag}/from_codes/{self._waves.name}"] = self._waves(ours), rate
                if tag not in self._recorded_heard:
                    # What the way from mel to wave costs by itself: it never changes, so once is enough.
                    waves[f"{tag}/from_recorded_mel/{self._waves.name}"] = self._recorded_waves(theirs), rate
                    self._recorded_heard.add(tag)
                pictures[f"{tag}/recorded_above_from_codes_below"] = mel_image([theirs, ours], [SAME_RATE, self._ratio])
        return None if self._waves is None else SoundSamples(waves, pictures)

    def _first_batch(self, name: str) -> dict[str, np.ndarray]:
        """This host's rows of the mixture's first step."""
        if name not in self._batches:
            with closing(self._mixtures[name].steps(None)) as steps:
                self._batches[name] = next(steps).batch
        return self._batches[name]


def check_samples(run: RunConfig, omni: OmniConfig) -> None:
    """Raises ConfigError where `eval.audio_every`, `audio_samples` and `vocoder` do not fit the task, or each other."""
    wanted = run.eval
    if wanted.audio_every <= 0:
        return
    if run.task not in SOUND_TASKS:
        raise ConfigError(f"eval.audio_every {wanted.audio_every}: task {run.task} is none of {', '.join(SOUND_TASKS)}")
    if not wanted.mixtures or wanted.audio_samples < 1:
        raise ConfigError(
            f"eval.audio_every {wanted.audio_every} needs eval.mixtures and eval.audio_samples of at least 1"
        )
    if wanted.vocoder and run.task == "audio_tokenizer":
        raise ConfigError(f"eval.vocoder {wanted.vocoder}: a vocoder reads the mel of flow_matching, not the decoder's")
    if wanted.vocoder:
        check_vocoder(wanted.vocoder, omni)


def _tokenizer_mels(spec: StepSpec, run: RunConfig) -> Mels:
    """(parameters, batch) -> the mels of the first clips as recorded, at the first scale, and as decoded."""
    compute = spec.task.compute

    def mels_of(parameters, batch):
        model = spec.assemble(parameters, {})
        clips = clips_of(batch, compute)
        features, valid = model.audio_encoder.features(clips.mel, clips.lengths)
        _, quantized, _ = model.audio_encoder.quantizer.quantize(features)
        decoded = model.decode(quantized, valid)
        target = mel_targets_of(batch, ("scale_0",), compute)[0]
        return _first(run.eval.audio_samples, target, MelTarget(decoded.refined_mel, decoded.mel_lengths))

    return mels_of


def _flow_mels(spec: StepSpec, run: RunConfig) -> Mels:
    """(parameters, batch) -> the 24 kHz mels of the first clips as recorded and as sampled."""
    compute = spec.task.compute

    def mels_of(parameters, batch):
        model = spec.assemble(parameters, {})
        hidden, lengths = model.hidden(clips_of(batch, compute))
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, ("flow",), compute)[0])
        noise = jax.random.normal(jax.random.key(SAMPLING_SEED), mel.shape)
        sampled = sample_mel(model.flow, hidden, lengths, noise)
        return _first(run.eval.audio_samples, MelTarget(mel, lengths), MelTarget(sampled, lengths))

    return mels_of


def _first(count: int, *targets: MelTarget) -> tuple[MelTarget, ...]:
    """The first `count` clips that have a frame, whole on every device; where there are fewer, unused slots follow."""
    lengths: Int32[Array, " c"] = reshard(targets[0].lengths, P(None))
    places = jnp.argsort(lengths == 0, stable=True)[:count]

    def pick(x: Float[Array, "c ..."]) -> Array:
        return x.at[places].get(out_sharding=P(*[None] * x.ndim))

    return tuple(MelTarget(pick(target.mel.astype(jnp.float32)), pick(target.lengths)) for target in targets)
