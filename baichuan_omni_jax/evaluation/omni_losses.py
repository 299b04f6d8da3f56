"""Held-out losses of one packed batch, by source."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import segments_with_media
from baichuan_omni_jax.train.omni_loss import by_source, entropies
from baichuan_omni_jax.train.state import Arrays, StepSpec

# Of a batch, see `make_eval_step`.
Sums = dict[str, Float[Array, "..."]]


def make_eval_step(spec: StepSpec, run: RunConfig, sources: int) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> sums of a batch whose `source_ids` are 0 .. `sources` - 1.

    `parameters` are all of them by dotted name, trainable and frozen. Sums, each with the weights to divide it by:
    `text`, `text_weight` (sources,); the same of documents without any picture or sound, `text_only`,
    `text_only_weight` (sources,); `audio`, `audio_weight` (sources, levels), of models with an audio head.
    """

    def sums_of(parameters, batch):
        model, batch = spec.assemble(parameters, {}), spec.task.weigh(batch)
        rules = model.compute.rules
        text, audio = entropies(model, batch, run)
        weights, source = batch["text_weights"], batch["source_ids"]
        sums = {
            "text": by_source(text * weights, source, sources),
            "text_weight": by_source(weights, source, sources),
        }

        indexes = [batch[name] for name in ("visual_index", "audio_index") if name in batch]
        alone = jnp.where(segments_with_media(batch["segment_ids"], indexes, rules), 0.0, weights)
        sums |= {"text_only": by_source(text * alone, source, sources)}
        sums |= {"text_only_weight": by_source(alone, source, sources)}
        if audio:
            source = batch["audio_target_sources"]
            weights = [batch["audio_weights"][:, :, q] for q in range(len(audio))]
            levels = [
                by_source(entropy * weight, source, sources) for entropy, weight in zip(audio, weights, strict=True)
            ]
            sums |= {"audio": jnp.stack(levels, 1)}
            sums |= {"audio_weight": jnp.stack([by_source(weight, source, sources) for weight in weights], 1)}
        return sums

    return jax.jit(sums_of)
