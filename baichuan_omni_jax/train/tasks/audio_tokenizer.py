"""Training of the audio tokenizer: mel reconstruction, the transcript read by a frozen model, commitment."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, reshard
from jaxtyping import Array, Float, PRNGKeyArray

from baichuan_omni_jax.audio.codebook_training import CodebookState, usage
from baichuan_omni_jax.audio.mel_training import reconstruction_loss, spec_augment
from baichuan_omni_jax.audio.quantizer_training import Quantized, commitment_weight, quantized_share, temperature
from baichuan_omni_jax.branches import AUDIO_TOKENIZER_BRANCHES, BRANCHES
from baichuan_omni_jax.config.mel_targets import reconstruction_ratios
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flops.audio import count_clips, tokenizer_terms
from baichuan_omni_jax.flops.batch_counts import count_batch
from baichuan_omni_jax.flops.terms import FlopTerm
from baichuan_omni_jax.nn.param import use
from baichuan_omni_jax.omni.audio_tokenizer_model import TokenizerModel, clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.train.tasks.audio import check_sound, sound_axes, sound_batch, sound_numbers, step_key
from baichuan_omni_jax.train.tasks.task import Metrics, Moved, PlainTask, Values
from baichuan_omni_jax.train.transcript import transcript_entropies

CODEBOOKS = BRANCHES["audio_encoder"].path("quantizer", "levels")
MOVING = ("embed", "embed_avg", "cluster_size")
_MASKS = 1 << 16  # sets the masks' draws apart from the levels'


class AudioTokenizerTask(PlainTask):
    """Branches `audio_encoder` and `audio_decoder`; with `transcript_adapter` and `llm` also what was said.

    `extra`: the step, and for each code of each level the steps since it was last used.
    """

    def make_model(self, key: PRNGKeyArray) -> TokenizerModel:
        return TokenizerModel(key, self.omni, self.compute, self._reads)

    def moves(self, name: str) -> bool:
        return name.startswith(CODEBOOKS)

    def first_extra(self, trainable: Values):
        sizes = self.omni.audio.codebook_sizes
        return {"step": jnp.zeros((), jnp.int32), "unused": [jnp.zeros(size, jnp.int32) for size in sizes]}

    def check(self, mesh: Mesh) -> None:
        check_sound(
            self.run, self.omni, mesh, self.compute, AUDIO_TOKENIZER_BRANCHES, needed=AUDIO_TOKENIZER_BRANCHES[:2]
        )
        if ("llm" in self.run.branches) != ("transcript_adapter" in self.run.branches):
            raise ConfigError("branches: llm reads transcripts through transcript_adapter; name both or neither")
        scales = self.run.tokenizer.mel_scales
        if not scales or any(hop < 1 or n_fft < hop for n_fft, hop in scales):
            raise ConfigError(f"tokenizer.mel_scales {scales} must be (n_fft, hop) pairs with n_fft >= hop >= 1")

    def batch_axes(self):
        return sound_axes(self._targets)

    def abstract_batch(self, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
        return sound_batch(self.run, self.omni, mesh, self.compute.rules)

    def denominators(self, batch: Batch) -> Float[Array, ""]:
        return jnp.maximum(batch["text_weights"].sum(), 1.0)

    def loss(self, model: TokenizerModel, batch: Batch, by, extra):
        settings, clips, step = self.run.tokenizer, clips_of(batch, self.compute), extra["step"]
        key = step_key(self.run, step)
        masks = jax.random.fold_in(key, _MASKS)
        clips = clips._replace(mel=spec_augment(masks, *clips, settings.spec_augment, self.compute))
        states = codebook_states(model, extra["unused"])
        made, valid = model.quantize(key, clips, states, step, settings.quantizer)
        decoded = model.decode(made.features, valid)
        ratios = reconstruction_ratios(settings.mel_scales, self.omni.post_net)
        targets = mel_targets_of(batch, self._targets, self.compute)
        reconstruction, metrics = reconstruction_loss(decoded, targets, ratios)
        first = settings.commitment if settings.commitment_start is None else settings.commitment_start
        weight = commitment_weight(first, settings.commitment, settings.quantizer, step)
        loss = settings.reconstruction * reconstruction + weight * made.commitment
        metrics |= {"loss_reconstruction": reconstruction, "loss_commitment": made.commitment}
        metrics |= {"commitment_weight": weight}
        if self._reads:
            entropies = transcript_entropies(model, made.features, valid, batch, self.run)
            transcript = (entropies * batch["text_weights"]).sum() / by
            loss = loss + settings.transcript * transcript
            metrics |= {"loss_transcript": transcript}
        metrics |= self._quantizer_numbers(made, step)
        moved = Moved(self._moved(made.states), {"step": step + 1, "unused": [state.unused for state in made.states]})
        return loss, ({"loss": loss} | metrics, moved)

    def batch_numbers(self, batch: Batch) -> Metrics:
        return sound_numbers(batch, self.omni)

    def parts(self) -> tuple[FlopTerm, ...]:
        return tokenizer_terms(self.omni, self._reads)

    def counts(self, batch: Batch) -> Metrics:
        return count_batch(self.weigh(batch)) | count_clips(batch["mel_lengths"], self.omni)

    @property
    def _reads(self) -> bool:
        return "llm" in self.run.branches

    @property
    def _targets(self) -> tuple[str, ...]:
        return tuple(f"scale_{number}" for number in range(len(self.run.tokenizer.mel_scales)))

    def _moved(self, states: tuple[CodebookState, ...]) -> dict[str, Array]:
        """The codebooks, stored as parameters are."""
        whole, vector = self.compute.rules.spec("codes", "embed"), self.compute.rules.spec("codes")
        specs = {"embed": whole, "embed_avg": whole, "cluster_size": vector}
        return {
            f"{CODEBOOKS}{q}.{name}": reshard(getattr(state, name), specs[name])
            for q, state in enumerate(states)
            for name in MOVING
        }

    def _quantizer_numbers(self, made: Quantized, step) -> Metrics:
        config = self.run.tokenizer.quantizer
        numbers = {"quantized_share": quantized_share(config, step), "temperature": temperature(config, step)}
        for q, state in enumerate(made.states):
            used, perplexity = usage(state, max(config.restart_after, 1))
            numbers |= {f"codes_used_q{q}": used, f"perplexity_q{q}": perplexity, f"residual_q{q}": made.residuals[q]}
        return numbers


def codebook_states(model: TokenizerModel, unused) -> tuple[CodebookState, ...]:
    """The model's codebooks, whole on every device, fp32."""
    compute = model.compute
    return tuple(
        CodebookState(*(use(getattr(level, name), compute, jnp.float32) for name in MOVING), count)
        for level, count in zip(model.audio_encoder.quantizer.levels, unused, strict=True)
    )
