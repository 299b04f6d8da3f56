"""A held-out mixture as questions: those that cannot be asked are counted by cause, and the others go on."""

import json

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from data_pipelines.documents.prompt_writing import image_tag, trainable, turn
from data_pipelines.held_out import HeldOutMixture
from data_pipelines.packing.rows import ALL_ROWS
from data_pipelines.pipeline import open_pipeline
from tests.helpers.small_media import noise_image


@pytest.fixture
def mixture(tmp_path):
    """Five documents: three questions about pictures, text that is no question, and a question too long for a row."""
    for seed, name in enumerate(("a", "b", "c")):
        Image.fromarray(noise_image(56, 56, seed)).save(tmp_path / f"{name}.png")
    texts = [turn(image_tag(f"{name}.png") + "What is this?", f"It is {name}.") for name in ("a", "b", "c")]
    texts += [trainable("It is what it is."), turn("What is this? " * 40, "It is long.")]
    lines = [json.dumps({"text": str(text)}) + "\n" for text in texts]
    (tmp_path / "held.jsonl").write_text("".join(lines))
    config = DataConfig(
        root=str(tmp_path),
        mixture=(SourceConfig(name="held", manifest="held.jsonl"),),
        rows=1,
        budgets=Budgets(tokens=96, patches=64, audio_frames=0, audio_targets=0),
        max_bad_fraction=0.5,
        workers=0,
    )
    return HeldOutMixture(open_pipeline(config, tiny()), None, ALL_ROWS)


def test_what_is_no_question_is_counted(mixture):
    questions, left_out = mixture.questions("held", 10)
    assert [question.reference for question in questions] == ["It is a.", "It is b.", "It is c."]
    assert [question.location for question in questions] == [f"held.jsonl:{line}" for line in (1, 2, 3)]
    assert left_out["no_question"] >= 1
    assert [question.reference for question in mixture.questions("held", 2)[0]] == ["It is a.", "It is b."]


def test_a_picture_that_is_gone_is_its_own_documents_loss(mixture, tmp_path):
    (tmp_path / "b.png").unlink()
    questions, left_out = mixture.questions("held", 3)
    assert [question.reference for question in questions] == ["It is a.", "It is c."]
    assert left_out == {"missing_file": 1}
    # Exchanged media: of what is left, and the others are scored as they are.
    media = mixture.exchanged_media(4)
    assert media.left_out["missing_file"] == 1
    numbers = [set(np.unique(step.batch["document_ids"][step.batch["segment_ids"] > 0])) for step in media.own()]
    assert set().union(*numbers) == {0, 2}
