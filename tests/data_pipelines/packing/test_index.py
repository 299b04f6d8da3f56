"""Measuring a data set once, what is skipped and how it is told."""

import hashlib
import json
import logging
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.audio_codes.store import ENTRY
from data_pipelines.audio_codes.windows import listed, listing_job
from data_pipelines.datasets.jobs.job import run_job
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.datasets.shards import ShardFile, ShardWriter, write_description
from data_pipelines.documents.document import Lengths
from data_pipelines.documents.manifest import parse_line
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaRoot
from data_pipelines.packing import columns
from data_pipelines.packing import index as index_build
from data_pipelines.packing.columns import BYTES_PER_DOCUMENT, BYTES_PER_IMAGE, NAMES, make_columns
from data_pipelines.packing.index import load_index
from data_pipelines.packing.row_limits import TEXT_TARGETS
from data_pipelines.pipeline import open_pipeline
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from tests.helpers.small_media import write_audio, write_image

IMAGE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan><trainable_start>a cat<trainable_end>'
SPOKEN = 'hi<trainable_start><audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan><trainable_end>'
NOTHING = "nothing to learn<trainable_start><trainable_end>"
BAD = [
    ("{ no json", "bad_json", "m.jsonl:{} is not JSON"),
    (IMAGE % "gone.png", "missing_file", "gone.png does not exist"),
    (IMAGE % "s.wav", "unreadable_media", "s.wav is not a readable image"),
    ("<img_start_baichuan>{}<img_end_baichuan>", "bad_prompt", "<img_start_baichuan> names no file"),
    (IMAGE % "../x.png", "outside_root", "lies outside"),
    (NOTHING, "no_loss", "nothing in the document carries loss"),
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
    write_audio(tmp_path / "s.wav", 0.25)
    return tmp_path


def write(root, texts):
    """A manifest of these prompts; text that starts with a brace stands for itself."""
    lines = [text if text.startswith("{ ") else json.dumps({"text": text}) for text in texts]
    (root / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def load(root, processor):
    return load_index(config(root), SourceConfig(name="main", manifest="m.jsonl"), processor)


def test_lengths_are_those_of_the_encoded_documents(sample_pipeline, sample_codes):
    for index in sample_pipeline.indexes:
        for number in range(0, index.total, 17):
            lengths = sample_pipeline.processor.encode(index.document(number), sample_codes).lengths
            found = [lengths.tokens, lengths.patches, lengths.audio_frames, lengths.audio_targets]
            assert index.lengths(number)[:4].tolist() == found
            assert index.lengths(number)[TEXT_TARGETS] == lengths.text_targets
            assert index.document_lengths(number).trainable == lengths.text_targets + lengths.audio_targets
            assert index.image_patches(number) == list(lengths.image_patches)


def test_documents_are_found_by_their_place(root, processor):
    texts = [IMAGE % "a.png", NOTHING, "", SPOKEN]
    write(root, texts)
    (root / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + (root / "m.jsonl").read_bytes())
    index = load(root, processor)
    assert [index.document(i).text for i in index.numbers()] == [texts[0], texts[3]]
    assert [index.document(i).location for i in index.numbers()] == ["m.jsonl:1", "m.jsonl:4"]


def test_a_second_load_measures_nothing(root, processor, monkeypatch):
    first = load(write(root, [IMAGE % "a.png", SPOKEN, "{ no json"]), processor)
    monkeypatch.setattr(Processor, "measure", lambda *_: pytest.fail("measured again"))
    second = load(root, processor)
    assert isinstance(second.columns.lengths, np.memmap)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(first.columns, name), getattr(second.columns, name))
    assert [second.image_patches(i) for i in range(2)] == [first.image_patches(i) for i in range(2)] == [[24], []]
    assert (list(first.skipped), first.name, first.digest) == (list(second.skipped), second.name, second.digest)


def test_another_manifest_or_processor_is_measured_anew(root, processor, tokenizer):
    assert load(write(root, [SPOKEN]), processor).usable == 1
    assert load(write(root, [SPOKEN, SPOKEN]), processor).usable == 2
    longer, shorter = load(root, processor), load(root, Processor(tiny(), tokenizer, end_of_text=False))
    assert (longer.lengths(0) - shorter.lengths(0)).tolist() == [1, 0, 0, 0, 1, 0, 0]


def test_an_index_of_another_format_is_measured_anew(root, processor, monkeypatch):
    load(write(root, [SPOKEN]), processor)
    monkeypatch.setattr(index_build, "FORMAT", index_build.FORMAT + 1)
    assert load(root, processor).usable == 1
    assert len(list((root / ".cache").glob("m-*/meta.json"))) == 2


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in NAMES), "meta.json", "skipped.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed"])
def test_a_damaged_index_is_built_anew(name, damage, root, processor):
    whole = load(write(root, [IMAGE % "a.png", SPOKEN, "{ no json"]), processor)
    told = [whole.lengths(0).tolist(), list(whole.skipped), whole.image_patches(0)]
    (path,) = (root / ".cache").glob(f"m-*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        path.write_bytes(content[: len(content) - 3] if damage == "cut" else b"")
    again = load(root, processor)
    assert [again.lengths(0).tolist(), list(again.skipped), again.image_patches(0)] == told
    assert path.read_bytes() == content


def test_a_stopped_build_goes_on(root, processor, monkeypatch):
    """Parts that were measured are kept; what was not put together is no index."""
    texts = [SPOKEN, IMAGE % "a.png", *[SPOKEN] * 8]
    monkeypatch.setattr("data_pipelines.datasets.sources.PART_BYTES", 300)
    measure, left = Processor.measure, [4]

    def stopping(self, document):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("killed")
        return measure(self, document)

    with monkeypatch.context() as patch:
        patch.setattr(Processor, "measure", stopping)
        with pytest.raises(
            ConfigError, match=r"index of m\.jsonl: \d of \d shards failed, first part-\d+: MemoryError: killed"
        ):
            load(write(root, texts), processor)
    assert not list((root / ".cache").glob("m-*/meta.json"))
    measured = []
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "measure", lambda self, document: measured.append(1) or measure(self, document))
        index = load(root, processor)
    assert 0 < len(measured) < len(texts)
    assert [index.document(i).text for i in index.numbers()] == texts
    assert [index.document(i).location for i in index.numbers()] == [f"m.jsonl:{i + 1}" for i in range(len(texts))]
    assert index.image_patches(1) == [24]
    assert not list((root / ".cache").glob("*.building"))


def test_parts_measured_by_processes_are_the_same_index(root, processor, monkeypatch):
    write(root, [SPOKEN, "{ no json", IMAGE % "a.png", SPOKEN])
    alone = load(root, processor)
    skipped = list(alone.skipped)
    monkeypatch.setattr("data_pipelines.datasets.sources.PART_BYTES", 150)
    shutil.rmtree(root / ".cache")
    shared = load_index(config(root), SourceConfig(name="main", manifest="m.jsonl"), processor, workers=1)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(alone.columns, name), getattr(shared.columns, name))
    assert skipped == list(shared.skipped)


def test_bytes_of_a_document():
    """100 million documents of two images fit a host's memory, of which they need none."""
    made = make_columns([Lengths(tokens=9, patches=8, image_patches=(4, 4))] * 1000)
    held = sum(getattr(made, name).nbytes for name in NAMES)
    assert held == 1000 * (BYTES_PER_DOCUMENT + 2 * BYTES_PER_IMAGE) + 8
    assert f"{BYTES_PER_DOCUMENT} bytes a document and {BYTES_PER_IMAGE} an image" in columns.__doc__
    assert 10**8 * (BYTES_PER_DOCUMENT + 2 * BYTES_PER_IMAGE) == 5.6e9


def test_an_index_goes_to_workers_as_its_folder(root, processor):
    index = load(write(root, [SPOKEN] * 500), processor).within(Budgets())
    sent = pickle.dumps(index)
    assert len(sent) < 3000
    assert pickle.loads(sent).document(400).location == "m.jsonl:401"
    assert index.within(Budgets()).columns is index.columns, "no column is copied"


def test_a_built_data_set(root, processor, tmp_path):
    """Shards give the lengths that the manifest gives; documents are read from them."""
    write(root, [IMAGE % "a.png", NOTHING, SPOKEN])
    whole = load(root, processor)
    (root / "set").mkdir()
    media = {name: (root / name).read_bytes() for name in ("a.png", "s.wav")}
    shards = []
    for number, lines in enumerate([[1, 2], [3]]):
        path = root / "set" / f"documents-{number:05d}.array_record"
        with ShardWriter(path) as writer:
            for line in lines:
                document = parse_line(
                    (root / "m.jsonl").read_bytes().splitlines()[line - 1], line, "m.jsonl", MediaRoot(root)
                )
                writer.write(document, {name: data for name, data in media.items() if name in document.text})
        shards.append(
            ShardFile(path.name, len(lines), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        )
    write_description(root / "set", shards, {})
    (root / "a.png").unlink()
    index = load_index(config(root), SourceConfig(name="set", manifest="set"), processor)
    np.testing.assert_array_equal(index.columns.lengths, whole.columns.lengths)
    assert [index.document(i).text for i in index.numbers()] == [IMAGE % "a.png", SPOKEN]
    assert [index.location(i) for i in index.numbers()] == [f"set/documents-0000{i}.array_record:0" for i in range(2)]
    assert [(item.location, item.cause) for item in index.skipped] == [
        ("set/documents-00000.array_record:1", "no_loss")
    ]


def test_bad_lines_are_counted_by_cause_and_named(root, processor):
    texts = [text for bad, *_ in BAD for text in (bad, SPOKEN)]
    index = load(write(root, texts), processor)
    assert index.usable == len(BAD)
    assert index.causes() == Counter(cause for _, cause, _ in BAD)
    for place, (skipped, (_, cause, message)) in enumerate(zip(index.skipped, BAD, strict=True)):
        line = 2 * place + 1
        assert (skipped.location, skipped.cause) == (f"m.jsonl:{line}", cause)
        assert message.replace("{}", str(line), message.count("m.jsonl")) in skipped.message


def test_too_long_documents_move_to_the_skipped(root, processor):
    index = load(write(root, [SPOKEN, IMAGE % "a.png", NOTHING]), processor)
    speech, image = index.lengths(0), index.lengths(1)
    roomy = Budgets(tokens=99, patches=99, audio_frames=99, audio_targets=99)
    assert index.within(roomy).usable == 2
    exact = index.within(Budgets(tokens=99, patches=int(image[1]), audio_frames=3, audio_targets=4))
    assert exact.usable == 2, "exactly full is not too long"
    short = index.within(Budgets(tokens=99, patches=int(image[1]) - 1, audio_frames=99, audio_targets=99))
    assert [short.document(i).text for i in short.numbers()] == [SPOKEN]
    late = list(short.skipped)[-1]
    assert (late.location, late.cause) == ("m.jsonl:2", "too_long")
    assert late.message == f"{image[1]} patches exceed the row's {image[1] - 1}"
    silent = index.within(Budgets(tokens=99, patches=99, audio_frames=99, audio_targets=int(speech[3]) - 1))
    assert list(silent.skipped)[-1].message == "4 audio_targets exceed the row's 3"
    assert silent.causes() == {"no_loss": 1, "too_long": 1}


def test_images_that_no_part_of_a_row_holds(root, processor):
    write_image(root / "b.png", 112, 84)  # 48 patches; a.png has 24
    both = (IMAGE % "a.png").removesuffix("<trainable_start>a cat<trainable_end>") + IMAGE % "b.png"
    index = load(write(root, [IMAGE % "a.png", both, both + IMAGE % "b.png", SPOKEN]), processor)
    assert [index.image_patches(i) for i in range(4)] == [[24], [24, 48], [24, 48, 48], []]
    budgets = Budgets(tokens=999, patches=192, audio_frames=99, audio_targets=99)
    assert index.within(budgets).usable == index.within(budgets, 4).usable == 4
    tight = replace(budgets, patches=128)
    kept = index.within(tight, 2)
    assert [kept.image_patches(i) for i in kept.numbers()] == [[24], [24, 48], []]
    assert [kept.document(i).location for i in kept.numbers()] == ["m.jsonl:1", "m.jsonl:2", "m.jsonl:4"]
    late = list(kept.skipped)[-1]
    assert (late.location, late.cause) == ("m.jsonl:3", "too_long")
    parts = "the row's 2 parts (data.media_shards) of 64 patches"
    assert late.message == f"the document's 3 images of up to 48 patches do not all fit {parts}"
    narrow = index.within(tight, 4)
    assert [narrow.image_patches(i) for i in narrow.numbers()] == [[24], []]
    parts = "the row's 4 parts (data.media_shards) of 32 patches"
    assert [item.message for item in narrow.skipped] == [
        f"image 2 of the document has 48 patches, too many for one of {parts}"
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
    assert "look again" not in caplog.text
    pipeline = open_pipeline(config(root, max_bad_fraction=0.6), tiny())
    assert (pipeline.documents, len(list(pipeline.skipped))) == (10, 6)
    assert f"m.jsonl: 3 skipped for files as they once were; delete {pipeline.indexes[0].columns.folder}" in caplog.text


def test_a_source_without_usable_documents_is_told_at_once(root):
    """Not by the first step, which a worker process plans."""
    write(root, [NOTHING])
    with pytest.raises(ConfigError, match=r"source main has no usable document: skipped 1 no_loss of m\.jsonl"):
        open_pipeline(config(root, max_bad_fraction=1.0), tiny())


def test_no_place_for_the_cache(root):
    write(root, [SPOKEN])
    (root / ".cache").write_text("a file")
    with pytest.raises(ConfigError, match=r"\.cache.*: (File exists|Not a directory)"):
        open_pipeline(config(root), tiny())


def test_an_empty_mixture(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.mixture is empty"):
        open_pipeline(DataConfig(root=str(tmp_path)), tiny())


def test_audio_that_vanished_is_passed_over_when_tokenising(root, tmp_path):
    """Its documents are lost at decode and named there; the rest gets its codes."""
    write_audio(root / "other.wav", 0.25)
    write(root, [SPOKEN, SPOKEN.replace("s.wav", "other.wav")])
    pipeline = open_pipeline(config(root), tiny())
    (root / "s.wav").write_bytes((root / "other.wav").read_bytes())

    def documents_with_clips(out):
        job = listing_job([pipeline], out)
        run_job(job, LocalRunner(0), report=lambda _: None)
        return listed(job, np.zeros(0, ENTRY))["document"].tolist()

    assert documents_with_clips(tmp_path / "both") == [0], "the same bytes are one clip"
    (root / "s.wav").unlink()
    assert documents_with_clips(tmp_path / "other") == [1]
    with pytest.raises(SampleError, match=r"s\.wav does not exist"):
        pipeline.processor.audio_items(pipeline.indexes[0].document(0))


@pytest.mark.parametrize(("built", "fits"), [("1fps", True), ("2fps", True), ("0.5fps", False), ("1fps:7", False)])
def test_shards_with_frames_that_the_model_does_not_take_are_refused(tmp_path, processor, built, fits):
    (tmp_path / "mix").mkdir()
    with ShardWriter(tmp_path / "mix" / "a-00000.array_record") as writer:
        writer.write(
            parse_line(
                json.dumps({"text": "hi<trainable_start>you<trainable_end>"}).encode(), 1, "m", MediaRoot(tmp_path)
            ),
            {},
        )
    size = (tmp_path / "mix" / "a-00000.array_record").stat().st_size
    write_description(tmp_path / "mix", [ShardFile("a-00000.array_record", 1, size, "0")], {"frames": built})
    config, source = DataConfig(root=str(tmp_path)), SourceConfig(name="a", manifest="mix")
    if fits:
        assert load_index(config, source, processor).usable == 1
        return
    with pytest.raises(
        ConfigError, match=f"source a: mix was built with --frames {built}, and the model takes 1 a second"
    ):
        load_index(config, source, processor)
