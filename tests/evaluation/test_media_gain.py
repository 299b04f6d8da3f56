"""What own media save of the loss: a hand case, a model that is blind, and what is exchanged with what."""

import json
from collections import Counter
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import Budgets, DataConfig, EvalConfig, EvalMixture, SourceConfig, resolve_model
from baichuan_omni_jax.evaluation.held_out import HeldOutEvaluation, mean_losses
from baichuan_omni_jax.nn.param import named_values
from baichuan_omni_jax.train.hooks import compile_held_out
from baichuan_omni_jax.train.input import BatchPlacer
from baichuan_omni_jax.train.state import init_state, make_compute, make_step_spec
from data_pipelines.documents.prompt_writing import image_tag, join, speech_tag, trainable, turn
from data_pipelines.held_out import HeldOutMixture
from data_pipelines.packing.rows import ALL_ROWS
from data_pipelines.pipeline import open_pipeline
from tests.helpers.losses import LEVELS
from tests.helpers.micro import micro_run, one_device
from tests.helpers.small_media import write_audio


@dataclass(frozen=True)
class HandSteps:
    batch: float


class HandData:
    """A mixture of two sources; the exchanged steps cost more."""

    sources = ("pictures", "voices")

    def steps(self, state):
        return iter([HandSteps(0.0)] * 9)

    def exchanged_media(self, steps):
        assert steps == 2
        return HandMedia(lambda: iter([HandSteps(1.0)] * 3), lambda: iter([HandSteps(2.0)] * 3), Counter())


@dataclass(frozen=True)
class HandMedia:
    own: object
    exchanged: object
    left_out: Counter


def test_gains_are_exchanged_minus_own_by_source_and_kind(micro_root):
    """Text 3.0 with others' pictures and 2.5 with its own; audio 4.0 with others' text and 3.0 with its own."""
    run = micro_run(micro_root)
    # By source and kind: pictures' media, pictures' text, voices' media, voices' text.
    text = {0.0: [1.0, 0, 1.0, 0], 1.0: [2.5, 0, 0, 1.0], 2.0: [3.0, 0, 0, 1.0]}
    audio = {0.0: [0.0] * 4, 1.0: [0, 0, 0, 3.0], 2.0: [0, 0, 0, 4.0]}

    def sums_of(parameters, batch):
        values = np.array(text[batch]), np.array(audio[batch])
        weights = [(value > 0) * 10.0 for value in values]
        sums = {"text": 10 * values[0], "text_weight": weights[0], "text_only": 0 * values[0]}
        sums |= {"text_only_weight": 0 * values[0], "audio": 10 * np.tile(values[1][:, None], LEVELS)}
        return sums | {"audio_weight": np.tile(weights[1][:, None], LEVELS)}

    mixture = EvalMixture(name="new", sources=(), swapped=True)
    config = EvalConfig(every=1, steps=2, mixtures=(mixture,))
    means_of = lambda sums, sources: mean_losses(sums, sources, run.train)  # noqa: E731
    scores = HeldOutEvaluation(config, {"new": HandData()}, lambda batch: batch, sums_of, means_of)({})
    assert scores["eval/new/pictures/loss_text_swapped"] == pytest.approx(3.0)
    assert scores["eval/new/pictures/media_gain"] == pytest.approx(0.5)
    assert scores["eval/new/voices/loss_audio_swapped"] == pytest.approx(4.0)
    assert scores["eval/new/voices/text_gain"] == pytest.approx(1.0)
    assert "eval/new/voices/media_gain" not in scores
    assert "eval/new/pictures/text_gain" not in scores
    # Not asked for: neither planned nor scored.
    config = EvalConfig(every=1, steps=2, mixtures=(replace(mixture, swapped=False),))
    scores = HeldOutEvaluation(config, {"new": HandData()}, lambda batch: batch, sums_of, means_of)({})
    assert not [name for name in scores if "gain" in name or "swapped" in name]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A held-out mixture of pictures of one size, two of them of one content, of texts spoken, and of text alone."""
    root = tmp_path_factory.mktemp("pictures")
    for number, level in enumerate((0, 80, 160, 160)):
        Image.new("RGB", (56, 56), (level, 255 - level, 0)).save(root / f"{number}.png")
    write_audio(root / "one.wav", 1.2)
    write_audio(root / "two.wav", 1.2)
    lines = [turn(image_tag(f"{n}.png") + f"What is number {n}?", "It is a color.") for n in range(4)]
    lines += [join([f"Good day {name}.", trainable(speech_tag(f"{name}.wav"))]) for name in ("one", "two")]
    lines += [turn("What is a color?", "It is red.")]
    (root / "held.jsonl").write_text("".join(json.dumps({"text": str(text)}) + "\n" for text in lines))
    config = DataConfig(
        root=str(root),
        mixture=(SourceConfig(name="held", manifest="held.jsonl"),),
        rows=2,
        budgets=Budgets(tokens=128, patches=64, audio_frames=64, audio_targets=64),
        workers=0,
    )
    return config


def test_documents_are_exchanged_with_another_content_of_their_kind(pictures):
    data = HeldOutMixture(open_pipeline(pictures, resolve_model("tiny")), None, ALL_ROWS)
    media = data.exchanged_media(3)
    own, exchanged = ([step.batch for step in steps()] for steps in (media.own, media.exchanged))
    assert media.left_out == {}
    # Four documents of pictures in source 0, two of speech in source 1; that of text alone in neither.
    for batches in (own, exchanged):
        ids = {
            (int(source), int(number))
            for batch in batches
            for source, number in zip(
                batch["source_ids"][batch["segment_ids"] > 0],
                batch["document_ids"][batch["segment_ids"] > 0],
                strict=True,
            )
        }
        assert ids == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5)}
        assert all(len(batch["tokens"]) == 2 for batch in batches)
    targets = [sum(batch["text_weights"].sum() for batch in batches) for batches in (own, exchanged)]
    assert targets[0] == targets[1] > 0
    # Read again, the steps are the same.
    again = [step.batch for step in media.exchanged()]
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(again, exchanged, strict=True) for name in a)


@pytest.mark.slow
def test_a_blind_model_gains_nothing_and_another_something(pictures):
    """With the projector's weights at zero every picture looks alike; all pictures have one size."""
    run = micro_run("unused")
    run = replace(run, data=pictures, compute=replace(run.compute, loss_chunk=64))
    omni, mesh, compute = resolve_model(run.model), one_device(), make_compute(run)
    data = HeldOutMixture(open_pipeline(pictures, omni), None, ALL_ROWS)
    config = EvalConfig(every=1, steps=3, mixtures=(EvalMixture(name="new", sources=(), swapped=True),))
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        state, _ = init_state(run, spec)
        place = BatchPlacer(pictures.rows, spec.task.batch_axes(), mesh, compute.rules)
        sums_of = compile_held_out(spec, 2)
        evaluation = HeldOutEvaluation(config, {"new": data}, place, sums_of, spec.task.held_out_means)
        values = state.trainable | state.frozen
        seen = evaluation(values)
        blind = evaluation(
            {name: value * 0 if name.startswith("vision.projector.") else value for name, value in values.items()}
        )
    assert set(named_values(spec.template)) <= set(values)
    assert blind["eval/new/held/media_gain"] == 0
    assert abs(seen["eval/new/held/media_gain"]) > 1e-5
    # Of speech the text is exchanged, which no projector touches.
    assert blind["eval/new/held/text_gain"] == seen["eval/new/held/text_gain"] != 0
