"""The tasks that train on audio: the audio tokenizer, and flow matching on what the frozen tokenizer makes of a clip.

Both read packed rows with mel slots. The tokenizer learns to give back the mel, to be read by a frozen language model,
and to commit to its codes (arXiv:2502.17239, section 3.1); flow matching learns the 24 kHz mel.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, reshard
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from baichuan_omni_jax.audio.mel_training import reconstruction_loss, spec_augment
from baichuan_omni_jax.audio.quantizer_training import (
    CodebookState,
    Quantized,
    commitment_weight,
    quantized_share,
    temperature,
    usage,
)
from baichuan_omni_jax.branches import AUDIO_TOKENIZER_BRANCHES, BRANCHES, FLOW_MATCHING_BRANCHES
from baichuan_omni_jax.config.mel_targets import flow_target, reconstruction_ratios
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.audio_scores import code_sums, flow_means, flow_sums, tokenizer_means
from baichuan_omni_jax.flops.audio import count_clips, flow_terms, tokenizer_terms
from baichuan_omni_jax.flops.terms import FlopTerm
from baichuan_omni_jax.flow.matching import flow_losses
from baichuan_omni_jax.nn.param import use
from baichuan_omni_jax.omni.audio_tokenizer_model import AudioTokenizerModel, clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel, match_lengths
from baichuan_omni_jax.train.input import abstract_mel_batch, check_audio_run, mel_batch_axes
from baichuan_omni_jax.train.losses import transcript_entropies
from baichuan_omni_jax.train.tasks.task import NO_UPDATES, Metrics, NonGradientUpdates, Sums, Task, Values

# Sets apart what is drawn from one key: each step's draws from those of the first weights, the masks' from the levels'.
_STEPS, _MASKS = 1 << 20, 1 << 16
_CODEBOOKS = BRANCHES["audio_encoder"].path("quantizer", "levels")
_CODEBOOK_PARTS = ("embed", "embed_avg", "cluster_size")


class AudioTask(Task):
    """What both tasks share: rows with mel slots, and mels to compare with by the names of `targets`."""

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Names the mels to compare with, as the batch's fields are called."""

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        return mel_batch_axes(self.targets)

    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_mel_batch(self.run, self.omni, mesh, self.compute.rules)

    def step_key(self, step: Int32[Array, ""]) -> PRNGKeyArray:
        """Returns the key of all that a step draws: it goes by `train.seed` and the step alone."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.run.train.seed), _STEPS), step)

    def batch_metrics(self, batch: Batch) -> Metrics:
        """Measures real tokens, clips and seconds of audio, and the used share of tokens and of mel slots."""
        # Unused slots have length 0.
        real, lengths = batch["segment_ids"] > 0, batch["mel_lengths"]
        frames = lengths.sum(dtype=jnp.float32)
        return {
            "tokens": real.sum(dtype=jnp.float32),
            "clips": (lengths > 0).sum(dtype=jnp.float32),
            "audio_seconds": frames * (self.omni.audio.hop_length / self.omni.audio.sampling_rate),
            "fill_tokens": jnp.mean(real, dtype=jnp.float32),
            "fill_mel": frames / (lengths.size * batch["mel"].shape[2]),
        }


class AudioTokenizerTask(AudioTask):
    """Branches `audio_encoder` and `audio_decoder`; with `transcript_adapter` and `llm` also the transcripts.

    `aux_state`: the step, and for each code of each level the steps since it was last used.
    """

    def make_model(self, key: PRNGKeyArray) -> AudioTokenizerModel:
        return AudioTokenizerModel(key, self.omni, self.compute, self.reads_transcripts)

    @property
    def reads_transcripts(self) -> bool:
        """Whether a frozen language model reads the features, for the transcripts' loss."""
        return "llm" in self.run.branches

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(f"scale_{number}" for number in range(len(self.run.tokenizer.mel_scales)))

    def check(self, mesh: Mesh) -> None:
        branches = AUDIO_TOKENIZER_BRANCHES
        check_audio_run(self.run, self.omni, mesh, self.compute, branches, required=branches[:2])
        # The language model reads through the adapter: one is no use without the other.
        if self.reads_transcripts != ("transcript_adapter" in self.run.branches):
            raise ConfigError("branches: llm reads transcripts through transcript_adapter; name both or neither")
        scales = self.run.tokenizer.mel_scales
        if not scales or any(hop < 1 or n_fft < hop for n_fft, hop in scales):
            raise ConfigError(f"tokenizer.mel_scales {scales} must be (n_fft, hop) pairs with n_fft >= hop >= 1")

    def changes_without_gradient(self, name: str) -> bool:
        return name.startswith(_CODEBOOKS)

    def init_aux_state(self, trainable: Values) -> dict[str, Any]:
        sizes = self.omni.audio.codebook_sizes
        return {"step": jnp.zeros((), jnp.int32), "unused": [jnp.zeros(size, jnp.int32) for size in sizes]}

    def denominators(self, batch: Batch) -> Float[Array, ""]:
        # Rows without a transcript divide nothing.
        return jnp.maximum(batch["text_weights"].sum(), 1.0)

    def loss(
        self, model: AudioTokenizerModel, batch: Batch, denominators: Float[Array, ""], aux_state: dict[str, Any]
    ) -> tuple[Float[Array, ""], tuple[Metrics, NonGradientUpdates]]:
        config, step = self.run.tokenizer, aux_state["step"]
        key = self.step_key(step)

        # Masked clips through encoder and quantizer, which moves its codebooks as it goes.
        clips = clips_of(batch, self.compute)
        masks = jax.random.fold_in(key, _MASKS)
        clips = clips._replace(mel=spec_augment(masks, *clips, config.spec_augment, self.compute))
        states = codebook_states(model, aux_state["unused"])
        made, valid = model.quantize(key, clips, states, step, config.quantizer)

        # Reconstruction: the decoded mel beside the recorded one, at every scale.
        decoded = model.decode(made.features, valid)
        ratios = reconstruction_ratios(config.mel_scales, self.omni.post_net)
        targets = mel_targets_of(batch, self.targets, self.compute)
        reconstruction, metrics = reconstruction_loss(decoded, targets, ratios)

        # Commitment: its weight goes from the first value to the last while the quantized share grows.
        first = config.commitment if config.commitment_start is None else config.commitment_start
        weight = commitment_weight(first, config.commitment, config.quantizer, step)
        loss = config.reconstruction * reconstruction + weight * made.commitment
        metrics |= {"loss_reconstruction": reconstruction, "loss_commitment": made.commitment}
        metrics |= {"commitment_weight": weight}

        # Transcript: what the frozen language model makes of the features.
        if self.reads_transcripts:
            entropies = transcript_entropies(model, made.features, valid, batch, self.run)
            transcript = (entropies * batch["text_weights"]).sum() / denominators
            loss = loss + config.transcript * transcript
            metrics |= {"loss_transcript": transcript}

        metrics |= self._quantizer_metrics(made, step)
        unused = [state.unused for state in made.states]
        updates = NonGradientUpdates(self._codebooks(made.states), {"step": step + 1, "unused": unused})
        return loss, ({"loss": loss} | metrics, updates)

    def _codebooks(self, states: Sequence[CodebookState]) -> dict[str, Array]:
        """The codebooks, stored as parameters are."""
        # They were whole on every device to be searched.
        matrix, vector = self.compute.rules.spec("codes", "embed"), self.compute.rules.spec("codes")
        specs = {"embed": matrix, "embed_avg": matrix, "cluster_size": vector}
        return {
            f"{_CODEBOOKS}{q}.{name}": reshard(getattr(state, name), specs[name])
            for q, state in enumerate(states)
            for name in _CODEBOOK_PARTS
        }

    def _quantizer_metrics(self, made: Quantized, step: Int32[Array, ""]) -> Metrics:
        config = self.run.tokenizer.quantizer
        # The schedules, then of every level how many codes are used, how evenly, and what it leaves.
        metrics = {"quantized_share": quantized_share(config, step), "temperature": temperature(config, step)}
        for q, state in enumerate(made.states):
            used, perplexity = usage(state, max(config.restart_after, 1))
            metrics |= {f"codes_used_q{q}": used, f"perplexity_q{q}": perplexity, f"residual_q{q}": made.residuals[q]}
        return metrics

    def flop_terms(self) -> tuple[FlopTerm, ...]:
        return tokenizer_terms(self.omni, self.reads_transcripts)

    def batch_counts(self, batch: Batch) -> Metrics:
        return super().batch_counts(batch) | count_clips(batch["mel_lengths"], self.omni)

    def held_out_sums(self, model: AudioTokenizerModel, batch: Batch, sources: int) -> Sums:
        """Sums as `code_sums`; with a transcript's loss also `transcript` (2,), from the features as they are and from
        their codes, and `transcript_weight`.
        """
        ratio = reconstruction_ratios(self.run.tokenizer.mel_scales, self.omni.post_net)[0]
        target = mel_targets_of(batch, ("scale_0",), self.compute)[0]
        clips = clips_of(batch, self.compute)
        sums, made = code_sums(model.audio_encoder, model.audio_decoder, clips, target, ratio)
        if self.reads_transcripts:
            # Read from the features and from their codes: the difference is what quantizing costs the transcript.
            weights, read = batch["text_weights"], (made.features, made.quantized)
            losses = [(transcript_entropies(model, x, made.valid, batch, self.run) * weights).sum() for x in read]
            sums |= {"transcript": jnp.stack(losses), "transcript_weight": weights.sum()}
        return sums

    def held_out_means(self, sums: Mapping[str, np.ndarray], sources: tuple[str, ...]) -> dict[str, float]:
        return tokenizer_means(sums, self.omni.audio.code_rate)


def codebook_states(model: AudioTokenizerModel, unused: Sequence[Array]) -> tuple[CodebookState, ...]:
    """Gathers the model's codebooks, whole on every device, fp32."""
    states = []
    for level, count in zip(model.audio_encoder.quantizer.levels, unused, strict=True):
        embed, average, size = (use(getattr(level, name), model.compute, jnp.float32) for name in _CODEBOOK_PARTS)
        states.append(CodebookState(embed, average, size, count))
    return tuple(states)


class FlowMatchingTask(AudioTask):
    """Branches `audio_encoder`, `audio_decoder` (both frozen) and `flow`.

    `aux_state`: the step and, with `flow.ema`, the running mean of the trained weights. A checkpoint's branch `flow`
    holds the mean, which is what one samples with; the weights themselves are saved in its place in `aux_state`.
    """

    @property
    def targets(self) -> tuple[str, ...]:
        return ("flow",)

    def make_model(self, key: PRNGKeyArray) -> FlowMatchingModel:
        return FlowMatchingModel(key, self.omni, self.compute)

    def check(self, mesh: Mesh) -> None:
        branches = FLOW_MATCHING_BRANCHES
        check_audio_run(self.run, self.omni, mesh, self.compute, branches, required=branches)
        # A mel frame for each state: flow matching predicts them side by side.
        made, states = flow_target(self.omni.flow).frame_rate, self.omni.audio.state_rate
        if made != states:
            raise ConfigError(
                f"flow.sampling_rate {self.omni.flow.sampling_rate} and flow.hop_length {self.omni.flow.hop_length} "
                f"make {float(made):g} mel frames a second, the audio decoder {float(states):g} states"
            )
        if not 0 <= self.run.flow.ema < 1:
            raise ConfigError(f"flow.ema {self.run.flow.ema} must be at least 0 and less than 1")

    def denominators(self, batch: Batch) -> tuple[()]:
        """Returns nothing: the losses are means over the batch's frames."""
        return ()

    def loss(
        self, model: FlowMatchingModel, batch: Batch, denominators: tuple[()], aux_state: dict[str, Any]
    ) -> tuple[Float[Array, ""], tuple[Metrics, NonGradientUpdates]]:
        # Conditions and targets are cut to what both have; the tokenizer before them is frozen.
        config, key = self.run.flow, self.step_key(aux_state["step"])
        hidden, lengths = model.hidden(clips_of(batch, self.compute))
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, self.targets, self.compute)[0])
        flow, prior = flow_losses(key, model.flow, hidden, mel, lengths, condition_dropout=config.condition_dropout)
        loss = flow + config.prior * prior
        return loss, ({"loss": loss, "loss_flow": flow, "loss_prior": prior}, NO_UPDATES._replace(aux_state=aux_state))

    def init_aux_state(self, trainable: Values) -> dict[str, Any]:
        # Begins as the weights themselves.
        mean = {name: value.astype(jnp.float32) for name, value in trainable.items()} if self.run.flow.ema else {}
        return {"step": jnp.zeros((), jnp.int32), "mean": mean}

    def update_aux(self, aux_state: dict[str, Any], trainable: Values) -> dict[str, Any]:
        """Follows faster in the first steps, when the weights it began with mean little."""
        step = aux_state["step"].astype(jnp.float32)
        decay = jnp.minimum(self.run.flow.ema, (1 + step) / (10 + step))
        blend = lambda mean, value: decay * mean + (1 - decay) * value  # noqa: E731
        mean = {name: blend(mean, trainable[name]) for name, mean in aux_state["mean"].items()}
        return {"step": aux_state["step"] + 1, "mean": mean}

    def to_checkpoint(self, values: Values, aux_state: dict[str, Any]) -> tuple[Values, dict[str, Any]]:
        """Lets weights and mean change places: there and back."""
        mean = aux_state["mean"]
        return {**values, **mean}, aux_state | {"mean": {name: values[name] for name in mean}}

    from_checkpoint = to_checkpoint

    def flop_terms(self) -> tuple[FlopTerm, ...]:
        return flow_terms(self.omni)

    def batch_counts(self, batch: Batch) -> Metrics:
        clips = count_clips(batch["mel_lengths"], self.omni, batch["target_flow_lengths"])
        return super().batch_counts(batch) | clips

    def held_out_sums(self, model: FlowMatchingModel, batch: Batch, sources: int) -> Sums:
        hidden, lengths = model.hidden(clips_of(batch, self.compute))
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, self.targets, self.compute)[0])
        return flow_sums(model.flow, hidden, mel, lengths)

    def held_out_means(self, sums: Mapping[str, np.ndarray], sources: tuple[str, ...]) -> dict[str, float]:
        return flow_means(sums)
