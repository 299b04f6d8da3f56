"""One training step: losses over a packed global batch, gradients, update, metrics. Held-out losses of one batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.nn.chunking import split_parts
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import pick_slots, segments_with_media
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import chunked_cross_entropy, cross_entropy
from baichuan_omni_jax.train.state import Arrays, Setup

# Of a batch, see `make_eval_step`.
Sums = dict[str, Float[Array, "..."]]
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


def make_gradients(setup: Setup, run: RunConfig) -> Callable[[Arrays, Arrays, Batch], tuple[Arrays, Metrics]]:
    """(trainable, frozen, batch) -> (gradients, losses), of the batch in `train.accumulate` parts, summed in fp32."""

    def of_part(trainable, frozen, batch, by):
        def loss(trainable):
            return omni_loss(setup.assemble(trainable, frozen), batch, run, by)

        return jax.grad(loss, has_aux=True)(trainable)

    def of_batch(trainable, frozen, batch):
        by, count = denominators(batch), run.train.accumulate
        if count == 1:
            return of_part(trainable, frozen, batch, by)
        parts = {name: split_parts(field, count) for name, field in batch.items()}

        def add(total, part):
            gradients, metrics = of_part(trainable, frozen, part, by)
            return jax.tree.map(lambda total, one: total + one.astype(jnp.float32), total, (gradients, metrics)), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros_like(x, jnp.float32),
            jax.eval_shape(of_part, trainable, frozen, jax.tree.map(lambda x: x[0], parts), by),
        )
        return jax.lax.scan(add, zeros, parts)[0]

    return of_batch


def make_step(
    setup: Setup, run: RunConfig
) -> Callable[[Arrays, Arrays, optax.OptState, Batch], tuple[Arrays, optax.OptState, Metrics]]:
    """The compiled step: (trainable, frozen, opt_state, batch) -> (trainable, opt_state, metrics).

    Where the loss or the gradient's norm is not finite, parameters and optimizer state come back as they were, bit for
    bit, and `nonfinite` is 1 (else 0). Frozen parameters get no gradient.
    The first and third argument are donated, but not on CPU. There the gradients and the update are two programs:
    in one, XLA's concurrent CPU runtime was seen to get the gradients right but their global norm wrong in some calls
    (jax 0.10.2; https://github.com/jax-ml/jax/issues/39741 looks like it), and a resumed run must repeat the
    uninterrupted one exactly.
    """
    gradients_of_batch = make_gradients(setup, run)

    def gradients_of(trainable, frozen, batch):
        gradients, metrics = gradients_of_batch(trainable, frozen, batch)
        return gradients, metrics | fill_metrics(batch)

    def update(gradients, trainable, opt_state, loss):
        with jax.named_scope("optimizer"):
            norm = optax.global_norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)
            updates, new_state = setup.optimizer.update(gradients, opt_state, trainable)
            new = optax.apply_updates(trainable, updates), new_state
            trainable, opt_state = _where(finite, new, (trainable, opt_state))
            return trainable, opt_state, {"gradient_norm": norm, "nonfinite": 1.0 - finite}

    on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
    if on_cpu:
        gradients_of, update = jax.jit(gradients_of), jax.jit(update)

    def step(trainable, frozen, opt_state, batch):
        gradients, metrics = gradients_of(trainable, frozen, batch)
        trainable, opt_state, numbers = update(gradients, trainable, opt_state, metrics["loss"])
        return trainable, opt_state, metrics | numbers

    return step if on_cpu else jax.jit(step, donate_argnums=(0, 2))


def make_eval_step(setup: Setup, run: RunConfig, sources: int) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> sums of a batch whose `source_ids` are 0 .. `sources` - 1.

    `parameters` are all of them by dotted name, trainable and frozen. Sums, each with the weights to divide it by:
    `text`, `text_weight` (sources,); the same of documents without any picture or sound, `text_only`,
    `text_only_weight` (sources,); `audio`, `audio_weight` (sources, levels), of models with an audio head.
    """

    def sums_of(parameters, batch):
        model = setup.assemble(parameters, {})
        rules = model.compute.rules
        text, audio = entropies(model, batch, run)
        weights, source = batch["text_weights"], batch["source_ids"]
        sums = {
            "text": _by_source(text * weights, source, sources),
            "text_weight": _by_source(weights, source, sources),
        }

        indexes = [batch[name] for name in ("visual_index", "audio_index") if name in batch]
        alone = jnp.where(segments_with_media(batch["segment_ids"], indexes, rules), 0.0, weights)
        sums |= {"text_only": _by_source(text * alone, source, sources)}
        sums |= {"text_only_weight": _by_source(alone, source, sources)}
        if audio:
            # Counted from 1: slots beyond the row are picked as 0, no source.
            marked = (source + 1).astype(jnp.float32)[..., None]
            source = pick_slots(marked, batch["audio_target_index"], rules)[..., 0].astype(jnp.int32) - 1
            weights = [batch["audio_weights"][:, :, q] for q in range(len(audio))]
            levels = [
                _by_source(entropy * weight, source, sources) for entropy, weight in zip(audio, weights, strict=True)
            ]
            sums |= {"audio": jnp.stack(levels, 1)}
            sums |= {"audio_weight": jnp.stack([_by_source(weight, source, sources) for weight in weights], 1)}
        return sums

    return jax.jit(sums_of)


def _where(condition: Bool[Array, ""], new, old):
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _by_source(values: Float[Array, "b m"], source: Int32[Array, "b m"], sources: int) -> Float[Array, "sources"]:
    return jnp.stack([jnp.where(source == number, values, 0.0).sum() for number in range(sources)])
