"""The loss of a packed batch of all modalities: text, and the audio codes of speech."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import chunked_cross_entropy, cross_entropy

Metrics = dict[str, Float[Array, ""]]
# Sums of weights of a whole global batch: the text's, and each audio level's (levels,).
Denominators = tuple[Float[Array, ""], Float[Array, "levels"]]


def entropies(
    model: OmniModel, batch: Batch, run: RunConfig
) -> tuple[Float[Array, "b t"], tuple[Float[Array, "b c"], ...]]:
    """Cross-entropy of every text slot, and for each audio level of every frame to predict, fp32, not weighted."""
    hidden, audio_logits = model(batch)
    with jax.named_scope("text_loss"):
        text = chunked_cross_entropy(
            hidden,
            model.llm.head[...],
            batch["text_targets"],
            chunk=run.compute.loss_chunk,
            rules=model.compute.rules,
            weight_of=model.llm.head_weight,
        )
    with jax.named_scope("audio_loss"):
        audio = tuple(cross_entropy(logits, batch["audio_targets"][:, :, q]) for q, logits in enumerate(audio_logits))
    return text, audio


def denominators(batch: Batch) -> Denominators:
    """What the losses of a global batch are divided by, at least 1."""
    audio = batch["audio_weights"].sum((0, 1)) if "audio_weights" in batch else jnp.zeros(0)
    return jnp.maximum(batch["text_weights"].sum(), 1.0), jnp.maximum(audio, 1.0)


def omni_loss(
    model: OmniModel, batch: Batch, run: RunConfig, by: Denominators | None = None
) -> tuple[Float[Array, ""], Metrics]:
    """Text loss + audio_loss_weight * sum over levels of alpha_q * audio loss_q, each a weighted mean.

    Denominators are sums of weights over the global batch (MODEL.md section 8), so a row's documents count by their
    trainable tokens, whatever they are packed with. Levels without a target count 0. Of a part of the batch, with the
    whole one's `denominators`, it is the part's share: the shares add up to the whole.
    """
    by_text, by_level = denominators(batch) if by is None else by
    text, audio = entropies(model, batch, run)
    text = (text * batch["text_weights"]).sum() / by_text
    metrics = {"loss": text, "loss_text": text}
    if audio:
        levels = [(entropy * batch["audio_weights"][:, :, q]).sum() / by_level[q] for q, entropy in enumerate(audio)]
        alphas = run.train.audio_level_weights or (1.0 / len(levels),) * len(levels)
        total = sum(alpha * level for alpha, level in zip(alphas, levels, strict=True))
        metrics |= {"loss": text + run.train.audio_loss_weight * total, "loss_audio": total}
        metrics |= {f"loss_audio_q{q}": level for q, level in enumerate(levels)}
    return metrics["loss"], metrics


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
