"""Measuring a data set once, what is skipped and how it is told."""

import json
import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, ConfigError, DataConfig, SourceConfig, tiny
from data_pipelines import index as index_module
from data_pipelines.document import SampleError
from data_pipelines.index import load_index
from data_pipelines.pipeline import open_pipeline
from data_pipelines.processor import Processor
from data_pipelines.tokenizing import train_tokenizer
from tests.data_pipelines.small_media import write_image, write_sound

IMAGE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan><trainable_start>a cat<trainable_end>'
SPOKEN = 'hi<trainable_start><audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan><trainable_end>'
BAD = [
    ("{ no json", "bad_json", "m.jsonl:{} is not JSON"),
    (IMAGE % "gone.png", "missing_file", "gone.png does not exist"),
    (IMAGE % "s.wav", "unreadable_media", "s.wav is not a readable image"),
    ("<img_start_baichuan>{}<img_end_baichuan>", "bad_prompt", "<img_start_baichuan> names no file"),
    (IMAGE % "../x.png", "outside_root", "lies outside"),
    ("nothing to learn", "no_loss", "nothing in the document carries loss"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"] * 3, 330)


@pytest.fixture
def processor(tokenizer):
    return Processor(tiny(), tokenizer)


@pytest.fixture
def root(tmp_path):
    write_image(tmp_path / "a.png", 56, 84)
    write_sound(tmp_path / "s.wav", 0.25)
    return tmp_path


def write(root, texts):
    """A manifest of these prompts; text that starts with a brace stands for itself."""
    lines = [text if text.startswith("{ ") else json.dumps({"text": text}) for text in texts]
    (root / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def load(root, processor):
    return load_index("main", "m.jsonl", root, processor, root / ".cache")


def test_lengths_are_those_of_the_encoded_documents(sample_pipeline, sample_codes):
    for index in sample_pipeline.indexes:
        for number in range(0, len(index), 17):
            lengths = sample_pipeline.processor.encode(index.document(number), sample_codes).lengths
            found = [lengths.tokens, lengths.patches, lengths.audio_frames, lengths.audio_targets]
            assert index.needs(number)[:4].tolist() == found
            assert index.pictures_of(number) == list(lengths.pictures)


def test_documents_are_found_by_their_place(root, processor):
    texts = [IMAGE % "a.png", "nothing to learn", "", SPOKEN]
    write(root, texts)
    (root / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + (root / "m.jsonl").read_bytes())
    index = load(root, processor)
    assert [index.document(i).text for i in range(len(index))] == [texts[0], texts[3]]
    assert [index.document(i).where for i in range(len(index))] == ["m.jsonl:1", "m.jsonl:4"]


def test_a_second_load_measures_nothing(root, processor, monkeypatch):
    first = load(write(root, [IMAGE % "a.png", SPOKEN, "{ no json"]), processor)
    monkeypatch.setattr(Processor, "measure", lambda *_: pytest.fail("measured again"))
    second = load(root, processor)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    np.testing.assert_array_equal(first.offsets, second.offsets)
    assert [second.pictures_of(i) for i in range(2)] == [first.pictures_of(i) for i in range(2)] == [[24], []]
    assert (first.skipped, first.name) == (second.skipped, second.name)


def test_another_manifest_or_processor_is_measured_anew(root, processor, tokenizer):
    assert len(load(write(root, [SPOKEN]), processor)) == 1
    assert len(load(write(root, [SPOKEN, SPOKEN]), processor)) == 2
    longer, shorter = load(root, processor), load(root, Processor(tiny(), tokenizer, end_of_text=False))
    assert (longer.needs(0) - shorter.needs(0)).tolist() == [1, 0, 0, 0, 0, 0]


def test_an_index_of_another_format_is_measured_anew(root, processor, monkeypatch):
    load(write(root, [SPOKEN]), processor)
    (old,) = (root / ".cache").iterdir()
    old.write_bytes(b"what an earlier version wrote")
    monkeypatch.setattr(index_module, "FORMAT", index_module.FORMAT + 1)
    assert len(load(root, processor)) == 1


def test_a_stopped_build_leaves_no_index(root, processor, monkeypatch):
    write(root, [SPOKEN])

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(index_module.np, "savez", fail)
        with pytest.raises(OSError, match="disk full"):
            load(root, processor)
    assert not list((root / ".cache").iterdir())
    assert len(load(root, processor)) == 1


def test_bad_lines_are_counted_by_cause_and_named(root, processor):
    texts = [text for bad, *_ in BAD for text in (bad, SPOKEN)]
    index = load(write(root, texts), processor)
    assert len(index) == len(BAD)
    assert index.causes() == Counter(cause for _, cause, _ in BAD)
    for place, (skipped, (_, cause, message)) in enumerate(zip(index.skipped, BAD, strict=True)):
        line = 2 * place + 1
        assert (skipped.where, skipped.cause) == (f"m.jsonl:{line}", cause)
        assert message.replace("{}", str(line), message.count("m.jsonl")) in skipped.message


def test_too_long_documents_move_to_the_skipped(root, processor):
    index = load(write(root, [SPOKEN, IMAGE % "a.png", "nothing to learn"]), processor)
    speech, picture = index.needs(0), index.needs(1)
    roomy = Budgets(tokens=99, patches=99, audio_frames=99, audio_targets=99)
    assert len(index.within(roomy)) == 2
    exact = index.within(Budgets(tokens=99, patches=int(picture[1]), audio_frames=3, audio_targets=4))
    assert len(exact) == 2, "exactly full is not too long"
    short = index.within(Budgets(tokens=99, patches=int(picture[1]) - 1, audio_frames=99, audio_targets=99))
    assert [short.document(i).text for i in range(len(short))] == [SPOKEN]
    late = short.skipped[-1]
    assert (late.where, late.cause) == ("m.jsonl:2", "too_long")
    assert late.message == f"{picture[1]} patches exceed the row's {picture[1] - 1}"
    silent = index.within(Budgets(tokens=99, patches=99, audio_frames=99, audio_targets=int(speech[3]) - 1))
    assert silent.skipped[-1].message == "4 audio_targets exceed the row's 3"
    assert silent.causes() == {"no_loss": 1, "too_long": 1}


def test_pictures_that_no_part_of_a_row_holds(root, processor):
    write_image(root / "b.png", 112, 84)  # 48 patches; a.png has 24
    both = (IMAGE % "a.png").removesuffix("<trainable_start>a cat<trainable_end>") + IMAGE % "b.png"
    index = load(write(root, [IMAGE % "a.png", both, both + IMAGE % "b.png", SPOKEN]), processor)
    assert [index.pictures_of(i) for i in range(4)] == [[24], [24, 48], [24, 48, 48], []]
    budgets = Budgets(tokens=999, patches=192, audio_frames=99, audio_targets=99)
    assert len(index.within(budgets)) == len(index.within(budgets, 4)) == 4
    tight = replace(budgets, patches=128)
    kept = index.within(tight, 2)
    assert [kept.pictures_of(i) for i in range(3)] == [[24], [24, 48], []]
    assert [kept.document(i).where for i in range(3)] == ["m.jsonl:1", "m.jsonl:2", "m.jsonl:4"]
    late = kept.skipped[-1]
    assert (late.where, late.cause) == ("m.jsonl:3", "too_long")
    parts = "the row's 2 parts (data.media_shards) of 64 patches"
    assert late.message == f"the document's 3 pictures of up to 48 patches do not all fit {parts}"
    narrow = index.within(tight, 4)
    assert [narrow.pictures_of(i) for i in range(2)] == [[24], []]
    parts = "the row's 4 parts (data.media_shards) of 32 patches"
    assert [item.message for item in narrow.skipped] == [
        f"picture 2 of the document has 48 patches, too many for one of {parts}"
    ] * 2


def test_no_manifest(tmp_path, processor):
    with pytest.raises(ConfigError, match=r"source main: manifest .*m\.jsonl cannot be read: No such file"):
        load(tmp_path, processor)


def config(root, **changes):
    mixture = (SourceConfig(name="main", manifest="m.jsonl"),)
    budgets = Budgets(tokens=64, patches=64, audio_frames=16, audio_targets=16)
    return DataConfig(root=str(root), mixture=mixture, budgets=budgets, workers=0, **changes)


def test_more_bad_documents_than_allowed_stop_the_run(root, caplog):
    write(root, [text for text, *_ in BAD] + [SPOKEN] * 4)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError) as caught:
        open_pipeline(config(root), tiny())
    assert "6 of 10 documents are unusable (1 bad_json, 1 missing_file, " in str(caught.value)
    assert str(caught.value).endswith("more than data.max_bad_fraction 0.05")
    named = [record.getMessage() for record in caplog.records]
    assert sum("skipped m.jsonl:2 (missing_file): gone.png" in line for line in named) == 1
    pipeline = open_pipeline(config(root, max_bad_fraction=0.6), tiny())
    assert (pipeline.documents, len(pipeline.skipped)) == (10, 6)


def test_a_source_without_usable_documents_is_told_at_once(root):
    """Not by the first step, which a worker process plans."""
    write(root, ["nothing to learn"])
    with pytest.raises(ConfigError, match=r"source main \(m\.jsonl\) has no usable document: skipped 1 no_loss"):
        open_pipeline(config(root, max_bad_fraction=1.0), tiny())


def test_an_empty_mixture(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.mixture is empty"):
        open_pipeline(DataConfig(root=str(tmp_path)), tiny())


def test_sound_that_vanished_is_passed_over_when_tokenising(root):
    """Its documents are lost at decode and named there; the rest gets its codes."""
    write_sound(root / "other.wav", 0.25)
    write(root, [SPOKEN, SPOKEN.replace("s.wav", "other.wav")])
    pipeline = open_pipeline(config(root), tiny())
    (root / "s.wav").write_bytes((root / "other.wav").read_bytes())
    assert len(list(pipeline.audio_items())) == 1, "the same bytes are one clip"
    (root / "s.wav").unlink()
    assert [item.media.name for item in pipeline.audio_items()] == ["other.wav"]
    with pytest.raises(SampleError, match=r"s\.wav does not exist"):
        pipeline.processor.audio_items(pipeline.indexes[0].document(0))
