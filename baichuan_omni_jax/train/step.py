"""One training step: losses over a packed global batch, gradients, update, metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.train.losses import chunked_cross_entropy, cross_entropy
from baichuan_omni_jax.train.state import Arrays, Setup

Metrics = dict[str, Float[Array, ""]]


def omni_loss(model: OmniModel, batch: Batch, run: RunConfig) -> tuple[Float[Array, ""], Metrics]:
    """Text loss + audio_loss_weight * sum over levels of alpha_q * audio loss_q, each a weighted mean.

    Denominators are sums of weights over the global batch (MODEL.md section 8), so a row's documents count by their
    trainable tokens, whatever they are packed with. Levels without a target count 0.
    """
    hidden, audio_logits = model(batch)
    with jax.named_scope("text_loss"):
        text = chunked_cross_entropy(
            hidden,
            model.llm.head_weight(),
            batch["text_targets"],
            batch["text_weights"],
            chunk=run.compute.loss_chunk,
            rules=model.compute.rules,
        )
        text = text / jnp.maximum(batch["text_weights"].sum(), 1.0)
    levels = []
    with jax.named_scope("audio_loss"):
        for q, logits in enumerate(audio_logits):
            weights = batch["audio_weights"][:, :, q]
            entropy = cross_entropy(logits, batch["audio_targets"][:, :, q])
            levels.append((entropy * weights).sum() / jnp.maximum(weights.sum(), 1.0))
        alphas = run.train.audio_level_weights or (1.0 / len(levels),) * len(levels)
        audio = sum(alpha * level for alpha, level in zip(alphas, levels, strict=True))
    loss = text + run.train.audio_loss_weight * audio
    metrics = {"loss": loss, "loss_text": text, "loss_audio": audio}
    return loss, metrics | {f"loss_audio_q{q}": level for q, level in enumerate(levels)}


def fill_metrics(batch: Batch) -> Metrics:
    """Real tokens of the global batch, and the used share of each budget."""
    length = batch["tokens"].shape[1]
    used = lambda name: jnp.mean(batch[name] < length, dtype=jnp.float32)  # noqa: E731
    real = batch["segment_ids"] > 0
    return {
        "tokens": real.sum(dtype=jnp.float32),
        "fill_tokens": jnp.mean(real, dtype=jnp.float32),
        "fill_patches": jnp.mean(batch["patch_segments"] > 0, dtype=jnp.float32),
        "fill_audio": used("audio_index"),
    }


def make_step(
    setup: Setup, run: RunConfig
) -> Callable[[Arrays, Arrays, optax.OptState, Batch], tuple[Arrays, optax.OptState, Metrics]]:
    """The compiled step: (trainable, frozen, opt_state, batch) -> (trainable, opt_state, metrics).

    The first and third argument are donated, but not on CPU. There the gradients and the update are two programs:
    in one, XLA's concurrent CPU runtime was seen to get the gradients right but their global norm wrong in some calls
    (jax 0.10.2; https://github.com/jax-ml/jax/issues/39741 looks like it), and a resumed run must repeat the
    uninterrupted one exactly. Frozen parameters get no gradient.
    """

    def gradients_of(trainable, frozen, batch):
        def loss(trainable):
            return omni_loss(setup.assemble(trainable, frozen), batch, run)

        gradients, metrics = jax.grad(loss, has_aux=True)(trainable)
        return gradients, metrics | fill_metrics(batch)

    def update(gradients, trainable, opt_state):
        with jax.named_scope("optimizer"):
            updates, opt_state = setup.optimizer.update(gradients, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state, optax.global_norm(gradients)

    on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
    if on_cpu:
        gradients_of, update = jax.jit(gradients_of), jax.jit(update)

    def step(trainable, frozen, opt_state, batch):
        gradients, metrics = gradients_of(trainable, frozen, batch)
        trainable, opt_state, norm = update(gradients, trainable, opt_state)
        return trainable, opt_state, metrics | {"gradient_norm": norm}

    return step if on_cpu else jax.jit(step, donate_argnums=(0, 2))
