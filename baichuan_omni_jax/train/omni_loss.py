"""The loss of a packed batch of all modalities: text, and the audio codes of speech."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import cross_entropy, text_entropies

Metrics = dict[str, Float[Array, ""]]


class Denominators(NamedTuple):
    """What the losses of a whole global batch are divided by: the sums of weights of text and of each audio level.

    `audio_scale` is what the audio loss is multiplied by; `sources` what each source weighs in the loss, of all.
    """

    text: Float[Array, ""]
    levels: Float[Array, "levels"]
    audio_scale: Float[Array, ""]
    sources: Float[Array, "sources"]


def entropies(
    model: OmniModel, batch: Batch, run: RunConfig
) -> tuple[Float[Array, "b t"], tuple[Float[Array, "b c"], ...]]:
    """Cross-entropy of every text slot, and for each audio level of every frame to predict, fp32, not weighted."""
    hidden, audio_logits = model(batch)
    with jax.named_scope("text_loss"):
        text = text_entropies(model.llm, hidden, batch["text_targets"], run.compute.loss_chunk)
    with jax.named_scope("audio_loss"):
        audio = tuple(cross_entropy(logits, batch["audio_targets"][:, :, q]) for q, logits in enumerate(audio_logits))
    return text, audio


def denominators(batch: Batch, run: RunConfig) -> Denominators:
    """Of a global batch; a sum of 0 stands as 1, since there is nothing to divide.

    Audio counts in full from `audio_full_ratio` = r frames to predict a text target on (sums of weights, the first
    level's), else in proportion: with r = 1 and 10 frames beside 100 targets a frame weighs as much as a target, where
    the mean of its own few frames would weigh as much as all the text.
    """
    text, count = batch["text_weights"].sum(), len(run.data.mixture)
    by_text, scale = _nonzero(text), jnp.ones(())
    sources = by_source(batch["text_weights"], batch["source_ids"], count) / by_text
    if "audio_weights" not in batch:
        return Denominators(by_text, jnp.zeros(0), scale, sources)
    weights = batch["audio_weights"]
    levels = weights.sum((0, 1))
    full = run.train.audio_full_ratio * text
    scale = jnp.where(levels[0] < full, levels[0] / _nonzero(full), 1.0)
    frames = sum(
        alpha * weights[:, :, q] / _nonzero(levels[q]) for q, alpha in enumerate(level_weights(run, weights.shape[2]))
    )
    audio = by_source(frames, batch["audio_target_sources"], count)
    return Denominators(by_text, _nonzero(levels), scale, sources + run.train.audio_loss_weight * scale * audio)


def _nonzero(total: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(total > 0, total, 1.0)


def level_weights(run: RunConfig, levels: int) -> tuple[float, ...]:
    """alpha_q of each audio level."""
    return run.train.audio_level_weights or (1.0 / levels,) * levels


def by_source(values: Float[Array, "b m"], source: Int32[Array, "b m"], sources: int) -> Float[Array, "sources"]:
    """Sums of `values` by the source of each; a step compiled without data has none."""
    return jnp.where(source == jnp.arange(sources)[:, None, None], values, 0.0).sum((1, 2))


def omni_loss(
    model: OmniModel, batch: Batch, run: RunConfig, by: Denominators | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Text loss + audio_loss_weight * audio_scale * sum over levels of alpha_q * audio loss_q, each a weighted mean.

    Denominators are sums of weights over the global batch, so a row's documents count by the weights that the host gave
    them, whatever they are packed with. Levels without a target count 0. Of a part of the batch, with the whole one's
    `denominators`, it is the part's share: the shares add up to the whole.

    `loss/SOURCE` is the mean loss of what the source weighs in the whole batch.
    """
    by = denominators(batch, run) if by is None else by
    text, audio = entropies(model, batch, run)
    tokens, names = text * batch["text_weights"], [source.name for source in run.data.mixture]
    text = tokens.sum() / by.text
    metrics = {"loss": text, "loss_text": text}
    sources = by_source(tokens, batch["source_ids"], len(names)) / by.text
    if audio:
        frames = [entropy * batch["audio_weights"][:, :, q] for q, entropy in enumerate(audio)]
        levels = [frame.sum() / by.levels[q] for q, frame in enumerate(frames)]
        alphas = level_weights(run, len(levels))
        total = sum(alpha * level for alpha, level in zip(alphas, levels, strict=True))
        scale = run.train.audio_loss_weight * by.audio_scale
        metrics |= {"loss": text + scale * total, "loss_audio": total}
        metrics |= {f"loss_audio_q{q}": level for q, level in enumerate(levels)}
        spoken = sum(alpha * frame / by.levels[q] for q, (alpha, frame) in enumerate(zip(alphas, frames, strict=True)))
        sources += scale * by_source(spoken, batch["audio_target_sources"], len(names))
    sources /= _nonzero(by.sources)
    return metrics["loss"], metrics | {f"loss/{name}": sources[place] for place, name in enumerate(names)}


def share_metrics(batch: Batch, run: RunConfig) -> Metrics:
    """Of a global batch: `share/SOURCE`, what part of all weight in the loss is the source's; `audio_scale`."""
    by = denominators(batch, run)
    shares = by.sources / _nonzero(by.sources.sum())
    metrics = {f"share/{source.name}": shares[place] for place, source in enumerate(run.data.mixture)}
    return metrics | ({"audio_scale": by.audio_scale} if len(by.levels) else {})


def fill_metrics(batch: Batch) -> Metrics:
    """Real tokens of the global batch, and the used share of each budget."""
    real = batch["segment_ids"] > 0
    mean = lambda used: jnp.mean(used, dtype=jnp.float32)  # noqa: E731
    metrics = {"tokens": real.sum(dtype=jnp.float32), "fill_tokens": mean(real)}
    if "patch_segments" in batch:
        metrics["fill_patches"] = mean(batch["patch_segments"] > 0)
    if "audio_index" in batch:
        metrics["fill_audio"] = mean(batch["audio_index"] < real.shape[1])
    return metrics
