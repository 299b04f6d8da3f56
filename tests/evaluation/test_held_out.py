"""Held-out losses: the same numbers as a step's, by source and kind."""

import jax
import numpy as np
import pytest

from baichuan_omni_jax.config import resolve_model
from baichuan_omni_jax.evaluation.held_out import mean_losses
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.train.hooks import compile_held_out
from baichuan_omni_jax.train.state import make_step_spec
from data_pipelines.packing.batch import RowWriter, empty_rows
from tests.helpers.losses import BUDGETS, LEVELS, TOLERANCE, Losses, sample_documents
from tests.helpers.micro import micro_run, place


@pytest.fixture(scope="module")
def losses(micro_root):
    run = micro_run(micro_root)
    return Losses(run, resolve_model(run.model))


@pytest.fixture(scope="module")
def documents(micro_root, tmp_path_factory):
    return sample_documents(micro_run(micro_root), tmp_path_factory.mktemp("codes"))


def test_held_out_audio_counts_as_in_a_step(micro_root):
    """10 frames beside 100 targets with r = 1/2: the audio loss counts a fifth, in training and held out."""
    run = micro_run(micro_root, "train.audio_full_ratio=0.5", "train.audio_loss_weight=2.0")
    sums = {name: np.array([value]) for name, value in {"text": 300.0, "text_weight": 100.0}.items()}
    sums |= {"text_only": sums["text"], "text_only_weight": sums["text_weight"]}
    sums |= {"audio": np.full((1, LEVELS), 50.0), "audio_weight": np.full((1, LEVELS), 10.0)}
    means = mean_losses(sums, ("a",), run.train)
    assert means["loss"] == pytest.approx(3.0 + 2 * 0.2 * 5.0)
    assert (means["loss_text"], means["loss_audio"]) == (3.0, 5.0)
    silent = {**sums, "text": np.zeros(1), "text_weight": np.zeros(1)}
    assert mean_losses(silent, ("a",), run.train)["loss"] == pytest.approx(2 * 5.0)


@pytest.mark.slow
def test_held_out_sums_tell_sources_and_kinds_apart(losses, documents):
    """Each document a source of its own: sums and weights add up to the losses, and only the text is text alone."""
    batch = empty_rows(1, BUDGETS, losses.omni)
    writer = RowWriter(batch, 0)
    for number, document in enumerate(documents):
        writer.add(document, source=number, number=0)
    metrics, _ = losses(batch, np.ones(1 + LEVELS))
    with jax.set_mesh(losses.mesh), jax.default_matmul_precision("highest"):
        spec = make_step_spec(losses.run, losses.omni, losses.mesh, losses.compute)
        step = compile_held_out(spec, len(documents))
        sums = step(named_values(losses.model), place(batch, losses.mesh, losses.compute.rules))
    sums = jax.tree.map(np.asarray, sums)

    text = np.array([document.text_weights.sum() for document in documents])
    audio = np.array([document.audio_weights.sum(0) for document in documents])
    np.testing.assert_allclose(sums["text_weight"], text)
    np.testing.assert_allclose(sums["audio_weight"], audio)
    assert sums["text"].sum() / text.sum() == pytest.approx(metrics["loss_text"], rel=TOLERANCE)
    for level in range(LEVELS):
        loss = sums["audio"][:, level].sum() / audio[:, level].sum()
        assert loss == pytest.approx(metrics[f"loss_audio_q{level}"], rel=TOLERANCE)
    alone = np.array([not len(document.patches) and not len(document.audio_codes) for document in documents])
    assert alone.tolist() == [False] * 4 + [True, False]
    np.testing.assert_array_equal(sums["text_only"], np.where(alone, sums["text"], 0))
    np.testing.assert_array_equal(sums["text_only_weight"], np.where(alone, text, 0))
