"""Losses of packed rows: cross-entropies position by position, and the loss of a batch of all modalities."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.linear import ROWS, Gathered, product
from baichuan_omni_jax.nn.remat import split_parts
from baichuan_omni_jax.omni.audio_tokenizer_model import AudioTokenizerModel
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.merge import merge_media, pick_slots
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import ShardingRules, axis_product

Metrics = dict[str, Float[Array, ""]]

# The logit of what cannot be chosen: finite, as a chunk of the vocabulary may hold nothing else.
_NEVER = -1e30


class SpecialHead(NamedTuple):
    """Rows (n, d) that stand in for the head's rows `ids`."""

    ids: tuple[int, ...]
    weight: Gathered


class Denominators(NamedTuple):
    """What the losses of a whole global batch are divided by: the sums of weights of text and of each audio level.

    `audio_scale` is what the audio loss is multiplied by; `sources` what each source weighs in the loss, of all.
    """

    text: Float[Array, ""]
    levels: Float[Array, "levels"]
    audio_scale: Float[Array, ""]
    sources: Float[Array, "sources"]


def cross_entropy(logits: Float[Array, "... v"], targets: Int32[Array, "..."]) -> Float[Array, "..."]:
    """Computes -log softmax(logits)[target] in fp32."""
    logits = logits.astype(jnp.float32)
    # The target is picked by comparison, not by index: `v` may be split over devices.
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    sharding = jax.typeof(logits).sharding
    classes = jax.sharding.reshard(classes, sharding) if not sharding.mesh.empty else classes
    picked = jnp.where(classes == targets[..., None], logits, 0.0).sum(-1)
    return jax.nn.logsumexp(logits, -1) - picked


def chunked_cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int32[Array, "b t"],
    *,
    chunk: int,
    rules: ShardingRules,
    weight_of: Callable[[Array], Gathered],
    special: SpecialHead | None = None,
) -> Float[Array, "b t"]:
    """Computes each position's cross-entropy, fp32, from the logits `hidden @ weight_of(head).T`.

    Goes over the vocabulary in chunks: only as many logits are in memory as `chunk` positions of a row and shard have,
    forward and backward (each is recomputed), and only a chunk of the head, as stored, is gathered. One chunk is kept
    for the backward pass, which follows at once.

    Args:
        hidden: the last norm's output, in the compute dtype.
        head: as stored, fp32 or frozen bf16; its gradient is fp32 from the product on.
        targets: token ids, one a position.
        chunk: positions of a row and shard whose logits over the whole vocabulary may be in memory at once; 0: all.
        rules: how the logits are split: batch, length, act_vocab.
        weight_of: gathers rows of the head, and casts them to what the product takes.
        special: rows that stand in for some of the head's (special tokens that train in a frozen table).
    """
    chunks = _vocab_chunks(hidden, head, chunk, rules)
    vocab_ids = jax.sharding.reshard(jnp.arange(head.shape[0], dtype=jnp.int32), rules.spec("vocab"))
    if special is not None:
        # No target is -1: such a row is neither a rival nor picked.
        vocab_ids = jnp.where((vocab_ids[:, None] == jnp.asarray(special.ids)).any(-1), -1, vocab_ids)
    # fp32 here, so that the chunks' gradients are summed in fp32.
    wide = hidden.astype(jnp.float32)

    def logits_of(wide: Array, rows: Array, vocab_ids: Array) -> tuple[Array, Array]:
        with jax.named_scope("logits"):
            weight, spec = weight_of(rows), rules.spec("batch", "length", "act_vocab")
            x = wide.astype(hidden.dtype)
            logits = product("btd,vd->btv", x, weight, out=spec, dtype=jnp.float32)
            logits = logits if special is None else jnp.where(vocab_ids < 0, _NEVER, logits)
        picked = jnp.where(vocab_ids == targets[..., None], logits, 0.0).sum(-1)
        return jax.nn.logsumexp(logits, -1), picked

    # Each chunk's log-sum-exp and the target's logit, where the chunk has it; then over the chunks.
    rows = split_parts(head, chunks), split_parts(vocab_ids, chunks)
    of_chunk = jax.checkpoint(logits_of) if chunks > 1 else logits_of
    _, (totals, picked) = jax.lax.scan(lambda _, rows: (None, of_chunk(wide, *rows)), None, rows)
    if special is None:
        return jax.nn.logsumexp(totals, 0) - picked.sum(0)

    # The rows that stand in: few, so whole, and after the others.
    x, spec = wide.astype(hidden.dtype), rules.spec("batch", "length", None)
    logits = product("btd,nd->btn", x, special.weight, out=spec, dtype=jnp.float32)
    own = jnp.where(jnp.asarray(special.ids) == targets[..., None], logits, 0.0).sum(-1)
    total = jnp.logaddexp(jax.nn.logsumexp(totals, 0), jax.nn.logsumexp(logits, -1))
    return total - picked.sum(0) - own


def _vocab_chunks(hidden: Array, head: Array, chunk: int, rules: ShardingRules) -> int:
    """The fewest equal chunks of a shard's vocabulary whose logits are no more than those of `chunk` positions."""
    mesh = jax.typeof(hidden).sharding.mesh
    shards = lambda name: 1 if mesh.empty else axis_product(mesh, rules.axes(name))  # noqa: E731
    vocabulary, positions = head.shape[0] // shards("vocab"), hidden.shape[1] // shards("length")
    if not chunk:
        return 1
    # Equal chunks, so that one program serves all.
    divisors = (n for n in range(1, vocabulary + 1) if vocabulary % n == 0)
    return next(n for n in divisors if n * chunk >= positions or n == vocabulary)


def text_entropies(llm: LanguageModel, hidden: Float[Array, "b t d"], batch: Batch, chunk: int) -> Float[Array, "b t"]:
    """Computes each position's cross-entropy under the language model's head, as `chunked_cross_entropy`.

    With a budget of text targets logits are made for the slots of `text_target_index` alone; others are 0.
    """
    index, rules = batch.get("text_target_index"), llm.compute.rules
    # Without a budget the index is empty; rows that are made by hand may lack it.
    if index is None or not index.shape[1]:
        return _head_entropies(llm, hidden, batch["text_targets"], chunk)
    targets = pick_slots(batch["text_targets"][..., None], index, rules, "length")[..., 0]
    entropies = _head_entropies(llm, pick_slots(hidden, index, rules, "length"), targets, chunk)
    # Back to their slots, which have the weights; unused places of the index go nowhere.
    nothing = jnp.zeros_like(batch["text_weights"])[..., None]
    return merge_media(nothing, [(entropies[..., None], index)], rules, "length")[..., 0]


def _head_entropies(
    llm: LanguageModel, hidden: Float[Array, "b n d"], targets: Int32[Array, "b n"], chunk: int
) -> Float[Array, "b n"]:
    rows, special = llm.special_rows, None
    if rows is not None and rows.head is not None:
        special = SpecialHead(rows.ids, llm.head_weight(rows.head, axes=ROWS))
    return chunked_cross_entropy(
        hidden,
        llm.head[...],
        targets,
        chunk=chunk,
        rules=llm.compute.rules,
        weight_of=llm.head_weight,
        special=special,
    )


def transcript_entropies(
    model: AudioTokenizerModel, features: Float[Array, "c g f"], valid: Bool[Array, "c g"], batch: Batch, run: RunConfig
) -> Float[Array, "b t"]:
    """Computes the cross-entropy of every text target when the frozen language model reads these features of the rows'
    clips; fp32, not weighted.
    """
    hidden = model.transcript_states(features, valid, batch)
    return text_entropies(model.llm, hidden, batch, run.compute.loss_chunk)


def omni_entropies(
    model: OmniModel, batch: Batch, run: RunConfig
) -> tuple[Float[Array, "b t"], tuple[Float[Array, "b c"], ...]]:
    """Computes the cross-entropy of every text target, and for each audio level of every frame to predict; fp32, not
    weighted.
    """
    # Audio logits are few (frames to predict), so they are whole; text logits are not.
    hidden, audio_logits = model(batch)
    with jax.named_scope("text_loss"):
        text = text_entropies(model.llm, hidden, batch, run.compute.loss_chunk)
    with jax.named_scope("audio_loss"):
        audio = tuple(cross_entropy(logits, batch["audio_targets"][:, :, q]) for q, logits in enumerate(audio_logits))
    return text, audio


def omni_denominators(batch: Batch, run: RunConfig) -> Denominators:
    """Sums the weights of a global batch; a sum of 0 stands as 1, since there is nothing to divide.

    Audio counts in full from `audio_full_ratio` = r frames to predict a text target on (sums of weights, the first
    level's), else in proportion: with r = 1 and 10 frames beside 100 targets a frame weighs as much as a target, where
    the mean of its own few frames would weigh as much as all the text.
    """
    text, count = batch["text_weights"].sum(), len(run.data.mixture)
    text_sum, scale = _nonzero(text), jnp.ones(())
    sources = sum_by_source(batch["text_weights"], batch["source_ids"], count) / text_sum
    if "audio_weights" not in batch:
        return Denominators(text_sum, jnp.zeros(0), scale, sources)

    # The end frame weighs in level 0 alone, so each level has a sum of its own.
    weights = batch["audio_weights"]
    levels = weights.sum((0, 1))
    full = run.train.audio_full_ratio * text
    scale = jnp.where(levels[0] < full, levels[0] / _nonzero(full), 1.0)

    # What each source weighs in the whole loss: for the report, and to divide its own losses by.
    alphas = level_weights(run, weights.shape[2])
    frames = sum(alpha * weights[:, :, q] / _nonzero(levels[q]) for q, alpha in enumerate(alphas))
    audio = sum_by_source(jnp.asarray(frames), batch["audio_target_sources"], count)
    return Denominators(text_sum, _nonzero(levels), scale, sources + run.train.audio_loss_weight * scale * audio)


def omni_loss(
    model: OmniModel, batch: Batch, run: RunConfig, denominators: Denominators
) -> tuple[Float[Array, ""], Metrics]:
    """Computes text loss + audio_loss_weight * audio_scale * sum over levels of alpha_q * audio loss_q, each a weighted
    mean.

    Denominators are sums of weights over the global batch, so a row's documents count by the weights that the host gave
    them, whatever they are packed with. Levels without a target count 0. Of a part of the batch, with the whole one's
    `denominators`, it is the part's share: the shares add up to the whole.

    Args:
        model: the omni model with the parameters of the step.
        batch: (a part of) a packed global batch.
        run: its data's sources and the losses' weights.
        denominators: `omni_denominators` of the whole global batch.

    Returns:
        The loss; and `loss`, `loss_text`, `loss_audio`, `loss_audio_q*`, and `loss/SOURCE` of each source:
        the mean loss of what the source weighs in the whole batch.
    """
    text, audio = omni_entropies(model, batch, run)
    # Text: every position's loss by its weight, over the whole batch's sum.
    tokens, names = text * batch["text_weights"], [source.name for source in run.data.mixture]
    text = tokens.sum() / denominators.text
    metrics = {"loss": text, "loss_text": text}
    sources = sum_by_source(tokens, batch["source_ids"], len(names)) / denominators.text
    if audio:
        # Audio: each level by its own sum, then the levels by their alphas.
        frames = [entropy * batch["audio_weights"][:, :, q] for q, entropy in enumerate(audio)]
        levels = [frame.sum() / denominators.levels[q] for q, frame in enumerate(frames)]
        alphas = level_weights(run, len(levels))
        total = sum(alpha * level for alpha, level in zip(alphas, levels, strict=True))
        scale = run.train.audio_loss_weight * denominators.audio_scale
        metrics |= {"loss": text + scale * total, "loss_audio": total}
        metrics |= {f"loss_audio_q{q}": level for q, level in enumerate(levels)}
        spoken = sum(
            alpha * frame / denominators.levels[q] for q, (alpha, frame) in enumerate(zip(alphas, frames, strict=True))
        )
        sources += scale * sum_by_source(jnp.asarray(spoken), batch["audio_target_sources"], len(names))
    # Each source's part of the loss, over what it weighs in it.
    sources /= _nonzero(denominators.sources)
    return metrics["loss"], metrics | {f"loss/{name}": sources[place] for place, name in enumerate(names)}


def loss_share_metrics(batch: Batch, run: RunConfig) -> Metrics:
    """Measures a global batch: `loss_share/SOURCE`, what part of all weight in the loss is the source's; and
    `audio_loss_scale`.
    """
    denominators = omni_denominators(batch, run)
    shares = denominators.sources / _nonzero(denominators.sources.sum())
    metrics = {f"loss_share/{source.name}": shares[place] for place, source in enumerate(run.data.mixture)}
    return metrics | ({"audio_loss_scale": denominators.audio_scale} if len(denominators.levels) else {})


def level_weights(run: RunConfig, levels: int) -> tuple[float, ...]:
    """Returns alpha_q of each audio level."""
    return run.train.audio_level_weights or (1.0 / levels,) * levels


def sum_by_source(values: Float[Array, "b m"], source: Int32[Array, "b m"], sources: int) -> Float[Array, "sources"]:
    """Sums `values` by the source of each; a step compiled without data has none."""
    return jnp.where(source == jnp.arange(sources)[:, None, None], values, 0.0).sum((1, 2))


def _nonzero(total: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(total > 0, total, 1.0)
