"""The losses: packing changes nothing, chunks change nothing, and a batch without targets is harmless."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.config.loss_shares import POWERS
from baichuan_omni_jax.nn.linear import narrow
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.losses import (
    chunked_cross_entropy,
    cross_entropy,
    loss_share_metrics,
    omni_denominators,
)
from data_pipelines.documents.sequence import weigh
from data_pipelines.packing.batch import RowWriter, empty_rows
from tests.helpers.losses import BUDGETS, LEVELS, TOLERANCE, Losses, rows_of, sample_documents
from tests.helpers.micro import micro_run, one_device, place

# One of each branch and kind; a missing one would be a renamed parameter.
PARAMETERS = (
    "vision.tower.patch_embedding.kernel",
    "vision.projector.fc1.weight",
    "llm.embedding",
    "llm.head",
    "llm.layers.attention.q_proj.weight",
    "llm.layers.mlp.down_proj.weight",
    "audio_head.embedding.tables.0",
    "audio_head.embedding.tables.7",
    "audio_head.head.layers.attention.v_proj.weight",
    "audio_head.head.heads.0.weight",
)


def weights_of(batch) -> np.ndarray:
    """Sums of weights: the text's, then each audio level's."""
    return np.array([batch["text_weights"].sum(), *batch["audio_weights"].sum((0, 1))])


@pytest.fixture(scope="module")
def losses(micro_root, quick_compile):
    run = micro_run(micro_root)
    return Losses(run, resolve_model(run.model))


@pytest.fixture(scope="module")
def documents(micro_root, tmp_path_factory):
    return sample_documents(micro_run(micro_root), tmp_path_factory.mktemp("codes"))


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def test_packed_row_equals_documents_one_by_one(losses, documents):
    """Loss and gradients of one packed row against each document alone in a row, weighted by its trainable tokens."""
    packed = rows_of(documents, BUDGETS, losses.omni)
    totals = weights_of(packed)
    assert (totals > 0).all()
    assert (packed["patch_segments"] > 0).any()
    own = np.array([1.0] + [losses.run.train.audio_loss_weight / LEVELS] * LEVELS)
    metrics, gradient = losses(packed, own)

    expected, summed = np.zeros(1 + LEVELS), {name: 0.0 for name in gradient}
    for document in documents:
        alone = rows_of([document], BUDGETS, losses.omni)
        share = weights_of(alone) / totals
        one, part = losses(alone, own * share)
        expected += share * [one["loss_text"], *(one[f"loss_audio_q{level}"] for level in range(LEVELS))]
        for name, value in part.items():
            summed[name] = summed[name] + value.astype(np.float64)

    for name, value in zip(["loss_text", *(f"loss_audio_q{q}" for q in range(LEVELS))], expected, strict=True):
        assert metrics[name] == pytest.approx(value, rel=TOLERANCE), name
    assert metrics["loss"] == pytest.approx((own * expected).sum(), rel=TOLERANCE)
    worst = {name: relative(gradient[name], summed[name]) for name in PARAMETERS}
    assert max(worst.values()) <= TOLERANCE, worst


@pytest.mark.parametrize(("weighting", "power"), [("sqrt", 0.5), ("document", 1.0)])
def test_weighted_documents_equal_each_alone_weighted_by_hand(losses, documents, weighting, power):
    """Loss, gradients and the sources' shares of one packed row, by `document_weighting` and `loss_weight`."""
    factors, sources = np.array([1.0, 2.0, 0.5, 3.0, 1.0, 0.25]), [source.name for source in losses.run.data.mixture]
    owners = np.arange(len(documents)) % len(sources)
    packed = empty_rows(1, BUDGETS, losses.omni)
    writer = RowWriter(packed, 0)
    for number, (document, factor) in enumerate(zip(documents, factors, strict=True)):
        writer.add(weigh(document, weighting, factor), source=number % len(sources), number=number)
    # By hand: a document's targets n of a kind weigh n^(1 - power) in all, times its source's factor.
    alone = [rows_of([document], BUDGETS, losses.omni) for document in documents]
    counts = np.array([weights_of(each) for each in alone])
    by_hand = factors[:, None] * np.where(counts > 0, np.maximum(counts, 1) ** (1 - power), 0)
    shares = by_hand / by_hand.sum(0)
    own = np.array([1.0] + [losses.run.train.audio_loss_weight / LEVELS] * LEVELS)
    scale = min(1, by_hand[:, 1].sum() / (losses.run.train.audio_full_ratio * by_hand[:, 0].sum()))
    own[1:] *= scale

    metrics, gradient = losses(packed, own)
    found, summed = np.zeros_like(shares), {name: 0.0 for name in gradient}
    for number, each in enumerate(alone):
        one, part = losses(each, own * shares[number])
        found[number] = [one["loss_text"], *(one[f"loss_audio_q{level}"] for level in range(LEVELS))]
        for name, value in part.items():
            summed[name] = summed[name] + value.astype(np.float64)
    assert metrics["loss"] == pytest.approx((own * shares * found).sum(), rel=TOLERANCE)
    worst = {name: relative(gradient[name], summed[name]) for name in PARAMETERS}
    assert max(worst.values()) <= TOLERANCE, worst

    with jax.set_mesh(losses.mesh):
        measured = loss_share_metrics(place(packed, losses.mesh, losses.compute.rules), losses.run)
    for number, name in enumerate(sources):
        weight = (own * shares)[owners == number]
        assert measured[f"loss_share/{name}"] == pytest.approx(weight.sum() / own.sum(), rel=TOLERANCE)
        assert metrics[f"loss/{name}"] == pytest.approx(
            (weight * found[owners == number]).sum() / weight.sum(), rel=1e-5
        )


@pytest.mark.parametrize("weighting", ["token", "sqrt", "document"])
def test_what_a_document_weighs_is_shared_by_targets_that_count(documents, weighting):
    """Targets that no loss asks for weigh nothing, and the others what they would in a document without them."""
    spoken, mark = documents[3], 57
    masked = (spoken.text_targets == mark) & (spoken.text_weights > 0)
    assert masked.any()
    without = dataclasses.replace(spoken, text_weights=np.where(masked, 0, spoken.text_weights).astype(np.float32))
    found, expected = weigh(spoken, weighting, 2.0, (mark, 58)), weigh(without, weighting, 2.0)
    np.testing.assert_array_equal(found.text_weights, expected.text_weights)
    np.testing.assert_array_equal(found.audio_weights, expected.audio_weights)
    count = np.count_nonzero(without.text_weights)
    assert found.text_weights.sum() == pytest.approx(2 * count ** (1 - POWERS[weighting]) if count else 0)


@pytest.mark.parametrize(
    ("text", "frames", "ratio", "scale"),
    [
        (100, 10, 0.5, 0.2),
        (100, 10, 1.0, 0.1),
        (100, 50, 0.5, 1.0),
        (100, 80, 0.5, 1.0),
        (0, 3, 0.5, 1.0),
        (100, 1, 0.0, 1.0),
        (100, 0, 0.5, 0.0),
        (0, 0, 0.5, 1.0),
    ],
)
def test_few_frames_do_not_weigh_as_much_as_all_the_text(micro_root, text, frames, ratio, scale):
    """A frame weighs at most `audio_loss_weight / audio_full_ratio` text targets, however few frames there are."""
    run = micro_run(micro_root, f"train.audio_full_ratio={ratio}", "train.audio_loss_weight=2.0")
    audio = np.zeros((1, 90, 2), np.float32)
    audio[0, :frames] = 1
    denominators = omni_denominators(
        {
            "text_weights": jnp.ones((1, text)) if text else jnp.zeros((1, 1)),
            "source_ids": jnp.zeros((1, text or 1), jnp.int32),
            "audio_weights": jnp.asarray(audio),
            "audio_target_sources": jnp.full((1, 90), 3, jnp.int32),
        },
        run,
    )
    assert denominators.audio_scale == pytest.approx(scale)
    np.testing.assert_allclose(denominators.sources, [text > 0, 0, 0, 2 * scale * (frames > 0), 0], rtol=1e-6)
    if frames and text:
        frame, target = (
            2 * float(denominators.audio_scale) / float(denominators.levels[0]),
            1 / float(denominators.text),
        )
        assert frame <= 2 / ratio * target * (1 + 1e-6) if ratio else frame == 2


def test_no_targets_give_finite_losses_and_no_gradient(losses, documents):
    """Rows whose text weighs nothing and that hold no audio: losses 0, gradients 0, nothing NaN."""
    batch = rows_of(documents, BUDGETS, losses.omni)
    batch["text_weights"][:] = 0
    for name in ("audio_weights", "audio_targets", "audio_codes"):
        batch[name][:] = 0
    for name in ("audio_index", "audio_target_index"):
        batch[name][:] = BUDGETS.tokens
    metrics, gradient = losses(batch, np.ones(1 + LEVELS))
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["loss"] == 0
    assert [name for name, value in gradient.items() if value.any() or not np.isfinite(value).all()] == []


def test_text_alone_gives_audio_no_gradient(losses, documents):
    batch = rows_of([documents[0], documents[4]], BUDGETS, losses.omni)
    metrics, gradient = losses(batch, np.ones(1 + LEVELS))
    assert metrics["loss_text"] > 0
    assert metrics["loss_audio"] == 0
    assert all(np.isfinite(value).all() for value in gradient.values())
    assert [name for name, value in gradient.items() if name.startswith("audio_head") and value.any()] == []
    assert gradient["llm.head"].any()
    assert gradient["vision.tower.patch_embedding.kernel"].any()


@pytest.mark.parametrize("spare", [0, 40])
def test_logits_of_the_targets_alone_change_nothing(losses, documents, spare):
    """As many places as there are targets, and more; the order of the index says nothing."""
    whole = rows_of(documents, BUDGETS, losses.omni)
    targets = int(np.count_nonzero(whole["text_weights"]))
    batch = rows_of(documents, dataclasses.replace(BUDGETS, text_targets=targets + spare), losses.omni)
    index = batch["text_target_index"]
    np.testing.assert_array_equal(np.sort(index[0])[:targets], np.flatnonzero(whole["text_weights"][0]))
    assert (np.sort(index[0])[targets:] == BUDGETS.tokens).all()
    batch["text_target_index"] = np.random.default_rng(0).permuted(index, axis=1)
    weights = np.r_[1.0, np.full(LEVELS, 1 / LEVELS)]
    (metrics, gradient), (expected, same) = losses(batch, weights), losses(whole, weights)
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=TOLERANCE)
    assert max(relative(gradient[name], same[name]) for name in PARAMETERS) <= TOLERANCE


@pytest.mark.parametrize("chunk", [8, 7, 24, 100, 0])
def test_chunked_cross_entropy_equals_the_whole(chunk):
    """Value and gradients, for chunks that divide the 24 positions of a row, that do not, and that exceed it."""
    rng, mesh = np.random.default_rng(0), one_device()
    hidden, head = rng.standard_normal((2, 24, 16), np.float32), rng.standard_normal((40, 16), np.float32)
    targets = rng.integers(0, 40, (2, 24)).astype(np.int32)
    weights = rng.uniform(0, 1, (2, 24)).astype(np.float32)

    def chunked(hidden, head):
        rules, weight_of = ShardingRules(), lambda rows: narrow(rows, rows.dtype)
        entropy = chunked_cross_entropy(hidden, head, targets, chunk=chunk, rules=rules, weight_of=weight_of)
        return (entropy * weights).sum()

    def whole(hidden, head):
        return (cross_entropy(jnp.einsum("btd,vd->btv", hidden, head), targets) * weights).sum()

    def written_out(hidden, head):
        logits = jnp.einsum("btd,vd->btv", hidden, head)
        return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * weights).sum()

    with jax.default_matmul_precision("highest"):
        expected, gradients = jax.value_and_grad(written_out, (0, 1))(hidden, head)
        with jax.set_mesh(mesh):
            hidden, head, targets, weights = map(jnp.asarray, (hidden, head, targets, weights))
            for function in (chunked, whole):
                value, found = jax.jit(jax.value_and_grad(function, (0, 1)))(hidden, head)
                assert value == pytest.approx(float(expected), rel=1e-6)
                assert all(
                    relative(np.asarray(a), np.asarray(b)) <= TOLERANCE for a, b in zip(found, gradients, strict=True)
                )
