"""Training of the flow-matching decoder on what the frozen tokenizer makes of a clip."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from baichuan_omni_jax.branches import FLOW_MATCHING_BRANCHES
from baichuan_omni_jax.config.mel_targets import flow_target
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.audio import count_clips, flow_terms
from baichuan_omni_jax.flops.batch_counts import count_batch
from baichuan_omni_jax.flops.terms import FlopTerm
from baichuan_omni_jax.flow.matching import flow_losses
from baichuan_omni_jax.omni.audio_tokenizer_model import clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel, match_lengths
from baichuan_omni_jax.train.tasks.audio import check_sound, sound_axes, sound_batch, sound_numbers, step_key
from baichuan_omni_jax.train.tasks.task import NOTHING, Metrics, PlainTask, Values

_TARGETS = ("flow",)


class FlowMatchingTask(PlainTask):
    """Branches `audio_encoder`, `audio_decoder` (both frozen) and `flow`.

    `extra`: the step and, with `flow.ema`, the running mean of the trained weights. A checkpoint's branch `flow` holds
    the mean, which is what one samples with; the weights themselves are saved in its place among `extra`.
    """

    def make_model(self, key: PRNGKeyArray) -> FlowMatchingModel:
        return FlowMatchingModel(key, self.omni, self.compute)

    def first_extra(self, trainable: Values):
        mean = {name: value.astype(jnp.float32) for name, value in trainable.items()} if self.run.flow.ema else {}
        return {"step": jnp.zeros((), jnp.int32), "mean": mean}

    def finish(self, extra, trainable: Values):
        """The mean follows faster in the first steps, when the weights it began with mean little."""
        step = extra["step"].astype(jnp.float32)
        decay = jnp.minimum(self.run.flow.ema, (1 + step) / (10 + step))
        blend = lambda mean, value: decay * mean + (1 - decay) * value  # noqa: E731
        mean = {name: blend(mean, trainable[name]) for name, mean in extra["mean"].items()}
        return {"step": extra["step"] + 1, "mean": mean}

    def saved(self, values: Values, extra):
        """Weights and mean change places: there and back."""
        mean = extra["mean"]
        return {**values, **mean}, extra | {"mean": {name: values[name] for name in mean}}

    def check(self, mesh: Mesh) -> None:
        check_sound(self.run, self.omni, mesh, self.compute, FLOW_MATCHING_BRANCHES, needed=FLOW_MATCHING_BRANCHES)
        made, states = flow_target(self.omni.flow).frame_rate, self.omni.audio.state_rate
        if made != states:
            raise ConfigError(
                f"flow.sampling_rate {self.omni.flow.sampling_rate} and flow.hop_length {self.omni.flow.hop_length} "
                f"make {float(made):g} mel frames a second, the audio decoder {float(states):g} states"
            )
        if not 0 <= self.run.flow.ema < 1:
            raise ConfigError(f"flow.ema {self.run.flow.ema} must be at least 0 and less than 1")

    def batch_axes(self):
        return sound_axes(_TARGETS)

    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        return sound_batch(self.run, self.omni, mesh, self.compute.rules)

    def denominators(self, batch: Batch):
        return ()

    def loss(self, model: FlowMatchingModel, batch: Batch, by, extra):
        settings, clips = self.run.flow, clips_of(batch, self.compute)
        key = step_key(self.run, extra["step"])
        hidden, lengths = model.hidden(clips)
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, _TARGETS, self.compute)[0])
        flow, prior = flow_losses(key, model.flow, hidden, mel, lengths, condition_dropout=settings.condition_dropout)
        loss = flow + settings.prior * prior
        return loss, ({"loss": loss, "loss_flow": flow, "loss_prior": prior}, NOTHING._replace(extra=extra))

    def batch_numbers(self, batch: Batch) -> Metrics:
        return sound_numbers(batch, self.omni)

    def parts(self) -> tuple[FlopTerm, ...]:
        return flow_terms(self.omni)

    def counts(self, batch: Batch) -> Metrics:
        return count_batch(batch) | count_clips(batch["mel_lengths"], self.omni, batch["target_flow_lengths"])
