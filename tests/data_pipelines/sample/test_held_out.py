"""The held-out split of the sample data: nothing that its documents show, say or ask is in a training document."""

import json
import re

import pytest

from data_pipelines.documents.prompt_writing import plain_text
from data_pipelines.sample.__main__ import HELD_OUT_SOURCES, SAMPLE_SOURCES
from data_pipelines.sample.documents import HELD_OUT, plan_documents
from data_pipelines.sample.media import HELD_OUT_VOICES, MOST_SHARED, VOICES
from data_pipelines.sample.photographs import overlap
from tests.data_pipelines.sample.test_sample import media_of


@pytest.fixture(scope="module")
def planned():
    """The media, and the documents of both splits, of another seed than the other tests'."""
    plan, manifests = plan_documents(3)
    training = [document for name, _ in SAMPLE_SOURCES for document in manifests[name]]
    held_out = {name.removeprefix("held_out/"): manifests[name] for name, _ in HELD_OUT_SOURCES}
    return plan, training, held_out


def words(plan, document):
    """All that a document writes and says, in small letters, without spaces and punctuation."""
    said = [plan.speech[path].text for _, path in media_of(document) if path in plan.speech]
    return re.sub(r"\W", "", " ".join([plain_text(document["text"]), *said]).lower())


def test_every_ability_has_tens_of_documents_that_carry_loss(planned):
    _, _, held_out = planned
    assert set(held_out) == set(HELD_OUT)
    for name, documents in held_out.items():
        assert 24 <= len(documents) <= 40
        assert all("<trainable_start>" in document["text"] for document in documents)
        assert {document["id"].split("-")[0] for document in documents} == {f"held_out/{name}"}


def test_no_sentence_of_an_ability_is_in_a_training_document(planned):
    """Sentences to hear and to speak, and questions with their answers, in whichever form training has them."""
    plan, training, held_out = planned
    trained = "|".join(words(plan, document) for document in training)
    for name in ("asr", "tts"):
        for document in held_out[name]:
            sentence = re.sub(r"\W", "", plan.speech[media_of(document)[0][1]].text.lower())
            assert len(sentence) > 4
            assert sentence not in trained
    for document in held_out["text_qa"] + held_out["aqa"]:
        answer = re.search("<trainable_start>(.*)<trainable_end>", document["text"])[1]
        assert re.sub(r"\W", "", answer.lower()) not in trained


def test_the_splits_share_no_medium(planned):
    plan, training, held_out = planned
    used = {path for document in training for _, path in media_of(document)}
    asked = {path for documents in held_out.values() for document in documents for _, path in media_of(document)}
    assert not used & asked
    assert {path for path in asked if "held_out_" in path} == asked
    # Not the same picture or film under another name either, nor nearly the same crop.
    crops = [plan.images[path] for path in used if path in plan.images]
    for path in asked & plan.images.keys():
        assert max(overlap(plan.images[path], crop) for crop in crops) <= MOST_SHARED
    films = {clip.path: clip.video for clip in plan.videos}
    assert not {films[path] for path in asked if path in films} & {films[path] for path in used if path in films}
    # And no voice.
    voices = {plan.speech[path].voice for path in used & plan.speech.keys()}
    assert voices <= {voice for each in VOICES.values() for voice in each}
    new = {plan.speech[path].voice for path in asked & plan.speech.keys()}
    assert new == {voice for each in HELD_OUT_VOICES.values() for voice in each}
    assert not voices & new


def test_manifests_of_abilities_are_written_as_planned(sample_dir):
    _, manifests = plan_documents(0)
    for source, manifest in HELD_OUT_SOURCES:
        lines = (sample_dir / manifest).read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == manifests[source]
        assert all((sample_dir / path).is_file() for document in manifests[source] for _, path in media_of(document))
    assert json.loads((sample_dir / "sample.json").read_text())["held_out"] == {
        source: len(manifests[source]) for source, _ in HELD_OUT_SOURCES
    }
