"""Held-out clips as they come back from their codes, at set steps of a run that trains on audio: to hear and to see.

The tokenizer's own mel (62.5 Hz, 16 kHz) becomes audible by Griffin-Lim: no vocoder reads it. Flow matching samples the
24 kHz mel, for which there is a HiFT vocoder (`eval.vocoder`), or Griffin-Lim."""

from collections.abc import Callable, Mapping
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
from baichuan_omni_jax.evaluation.audio_scores import SAMPLING_SEED, MelWaves, check_vocoder, mel_image
from baichuan_omni_jax.evaluation.held_out import close_steps
from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.omni.audio_tokenizer_model import clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.flow_matching_model import match_lengths
from baichuan_omni_jax.train.hosts import is_process_zero
from baichuan_omni_jax.train.input import BatchPlacer, TrainingData
from baichuan_omni_jax.train.state import Arrays, StepSpec, TrainState, evaluation_values

AUDIO_TASKS = ("audio_tokenizer", "flow_matching")
Mels = Callable[[Arrays, Batch], tuple[MelTarget, ...]]


@dataclass(frozen=True)
class AudioSamples:
    """Waveforms in ±1 with their rate in Hz, and images, by the names they are shown under."""

    waves: Mapping[str, tuple[Float32[np.ndarray, " t"], int]]
    images: Mapping[str, UInt8[np.ndarray, "h w 3"]]


class AudioSampleLogger:
    """Makes the samples of the first `eval.audio_samples` clips of every mixture.

    Like an evaluation it changes nothing of what follows. Every host takes part; process zero alone makes waveforms.
    """

    def __init__(self, spec: StepSpec, place: BatchPlacer, mixtures: Mapping[str, TrainingData]) -> None:
        run, omni = spec.task.run, spec.task.omni
        self._config, self._spec, self._place, self._mixtures = run.eval, spec, place, mixtures
        self._batches: dict[str, dict[str, np.ndarray]] = {}
        self._recorded_done: set[str] = set()
        self._waves = self._recorded_waves = None
        # Nothing is compiled or loaded for a run without samples.
        if not self.is_due(0):
            return
        self._mels = jax.jit({"audio_tokenizer": _tokenizer_mels, "flow_matching": _flow_mels}[run.task](spec))
        self._target = decoded_target(omni.post_net) if run.task == "audio_tokenizer" else flow_target(omni.flow)
        # The recorded mel is the first target of the batch; rates may differ from the decoder's.
        recorded = next(iter(run_mel_targets(run, omni).values()))
        self._ratio = self._target.frame_rate / recorded.frame_rate
        if is_process_zero():
            self._waves = self._recorded_waves = MelWaves(self._target, omni, run.eval.vocoder)
            if recorded != self._target:  # the first scale need not be the decoder's own
                self._recorded_waves = MelWaves(recorded, omni)

    def is_due(self, step: int) -> bool:
        """Whether to make samples: before the first step, and after every `eval.audio_every`."""
        every = self._config.audio_every
        return bool(self._mixtures) and every > 0 and step % every == 0

    @property
    def sentence(self) -> str:
        """Says what there is to hear, and what makes it."""
        assert self._waves is not None, "process zero alone says it, of samples that are due"
        return (
            f"held-out audio: TensorBoard has {self._config.audio_samples} clips of each mixture every "
            f"{self._config.audio_every} steps, {self._target.rate} Hz by {self._waves.name}"
        )

    def __call__(self, state: TrainState) -> AudioSamples | None:
        """Returns the samples; None on hosts other than process zero."""
        waves, images, parameters = {}, {}, evaluation_values(self._spec, state)
        for name in self._mixtures:
            # All hosts compute; what follows is for process zero.
            recorded, made = jax.device_get(self._mels(parameters, self._place(self._first_batch(name))))
            if self._waves is None or self._recorded_waves is None:
                continue
            for clip in np.flatnonzero(np.minimum(recorded.lengths, made.lengths)):
                ours, theirs = (mel.mel[clip, : mel.lengths[clip]] for mel in (made, recorded))
                # What has no code is neither heard nor seen: both are of the same span of the clip.
                theirs = theirs[: frames_covered(len(ours), self._ratio)]
                tag, rate = f"eval/{name}/clip_{clip}", self._target.rate
                waves[f"{tag}/from_codes/{self._waves.name}"] = self._waves(ours), rate
                if tag not in self._recorded_done:
                    # What the way from mel to wave costs by itself: it never changes, so once is enough.
                    waves[f"{tag}/from_recorded_mel/{self._waves.name}"] = self._recorded_waves(theirs), rate
                    self._recorded_done.add(tag)
                images[f"{tag}/recorded_above_from_codes_below"] = mel_image([theirs, ours], [SAME_RATE, self._ratio])
        return None if self._waves is None else AudioSamples(waves, images)

    def _first_batch(self, name: str) -> dict[str, np.ndarray]:
        """Reads this host's rows of the mixture's first step."""
        if name not in self._batches:
            # Read once: the clips are the same ones every time.
            steps = self._mixtures[name].steps(None)
            self._batches[name] = next(steps).batch
            close_steps(steps)
        return self._batches[name]


def check_samples(run: RunConfig, omni: OmniConfig) -> None:
    """Raises ConfigError where `eval.audio_every`, `audio_samples` and `vocoder` do not fit the task, or each other."""
    wanted = run.eval
    if wanted.audio_every <= 0:
        return
    if run.task not in AUDIO_TASKS:
        raise ConfigError(f"eval.audio_every {wanted.audio_every}: task {run.task} is none of {', '.join(AUDIO_TASKS)}")
    if not wanted.mixtures or wanted.audio_samples < 1:
        raise ConfigError(
            f"eval.audio_every {wanted.audio_every} needs eval.mixtures and eval.audio_samples of at least 1"
        )
    if wanted.vocoder and run.task == "audio_tokenizer":
        raise ConfigError(f"eval.vocoder {wanted.vocoder}: a vocoder reads the mel of flow_matching, not the decoder's")
    if wanted.vocoder:
        check_vocoder(wanted.vocoder, omni)


def _tokenizer_mels(spec: StepSpec) -> Mels:
    """Returns (parameters, batch) -> the mels of the first clips as recorded, at the first scale, and as decoded."""
    compute, count = spec.task.compute, spec.task.run.eval.audio_samples

    def mels_of(parameters: Arrays, batch: Batch) -> tuple[MelTarget, ...]:
        model = spec.assemble(parameters, {})
        clips = clips_of(batch, compute)
        features, valid = model.audio_encoder.features(clips.mel, clips.lengths)
        # As after training: no dropout of levels, no share of unquantized clips.
        _, quantized, _ = model.audio_encoder.quantizer.quantize(features)
        decoded = model.decode(quantized, valid)
        target = mel_targets_of(batch, ("scale_0",), compute)[0]
        return _first(count, target, MelTarget(decoded.refined_mel, decoded.mel_lengths))

    return mels_of


def _flow_mels(spec: StepSpec) -> Mels:
    """Returns (parameters, batch) -> the 24 kHz mels of the first clips as recorded and as sampled."""
    compute, count = spec.task.compute, spec.task.run.eval.audio_samples

    def mels_of(parameters: Arrays, batch: Batch) -> tuple[MelTarget, ...]:
        model = spec.assemble(parameters, {})
        hidden, lengths = model.hidden(clips_of(batch, compute))
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, ("flow",), compute)[0])
        # The noise of the held-out scores, so that samples differ by the weights alone.
        noise = jax.random.normal(jax.random.key(SAMPLING_SEED), mel.shape)
        sampled = sample_mel(model.flow, hidden, lengths, noise)
        return _first(count, MelTarget(mel, lengths), MelTarget(sampled, lengths))

    return mels_of


def _first(count: int, *targets: MelTarget) -> tuple[MelTarget, ...]:
    """Picks the first `count` clips that have a frame, whole on every device; unused slots follow if they are fewer."""
    # Used slots first, in their order; a stable sort keeps them so.
    lengths: Int32[Array, " c"] = reshard(targets[0].lengths, P(None))
    places = jnp.argsort(lengths == 0, stable=True)[:count]

    def pick(x: Float[Array, "c ..."]) -> Array:
        return x.at[places].get(out_sharding=P(*[None] * x.ndim))

    return tuple(MelTarget(pick(target.mel.astype(jnp.float32)), pick(target.lengths)) for target in targets)
