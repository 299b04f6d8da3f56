"""Shards: documents and media through ArrayRecord and back, damaged files, bytes that do not vary."""

import pickle
import random
from pathlib import Path

import pytest

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.shards import (
    OPEN_FILES,
    ShardedDataset,
    ShardFile,
    ShardWriter,
    open_dataset,
    pack_document,
    unpack_document,
    write_description,
)
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media

OUTSIDE = '{"schema": 1, "fingerprint": "", "shards": [{"file": "../a", "documents": 1, "bytes": 1, "sha256": ""}]}'


def make_document(number: int) -> tuple[Document, dict[str, bytes]]:
    rng = random.Random(number)
    media = {f"图/{i}.png": rng.randbytes(rng.randrange(2000)) for i in range(number % 3)}
    return Document(f"id-{number}", "qa", f"text 猫 {number}", f"m.jsonl:{number + 1}", {}), media


def write_shard(path: Path, numbers: range) -> Path:
    with ShardWriter(path) as writer:
        for number in numbers:
            writer.write(*make_document(number))
    assert writer.documents == len(numbers)
    return path


@pytest.fixture
def dataset(tmp_path) -> ShardedDataset:
    """Documents 0..9 and 10..14."""
    shards = []
    for name, numbers in (("a", range(10)), ("b", range(10, 15))):
        path = write_shard(tmp_path / f"{name}.array_record", numbers)
        shards.append(ShardFile(path.name, len(numbers), path.stat().st_size, "-"))
    write_description(tmp_path, shards, {"documents": 15})
    return open_dataset(tmp_path)


def expected(number: int) -> tuple:
    document, media = make_document(number)
    return document.id, document.type, document.text, document.location, media


def contents(document: Document) -> tuple:
    media = {name: one.data for name, one in document.media.items()}
    return document.id, document.type, document.text, document.location, media


def test_documents_at_any_place(dataset):
    assert len(dataset) == 15
    places = [(0, record) for record in range(10)] + [(1, record) for record in range(5)]
    for number in random.Random(0).sample(range(15), 15):
        assert contents(dataset.document(*places[number])) == expected(number)
    assert [contents(document) for document in dataset.documents_of(1)] == [expected(n) for n in range(10, 15)]
    again = pickle.loads(pickle.dumps(dataset))
    assert contents(again.document(1, 2)) == expected(12)
    assert (again.fingerprint, again.shards) == (dataset.fingerprint, dataset.shards)
    with pytest.raises(IndexError):
        dataset.document(1, 5)


def test_more_shards_than_open_files(tmp_path):
    shards = []
    for number in range(OPEN_FILES + 3):
        write_shard(tmp_path / f"{number}.array_record", range(number, number + 1))
        shards.append(ShardFile(f"{number}.array_record", 1, 0, "-"))
    dataset = ShardedDataset(tmp_path, shards, "")
    for _ in range(2):
        for number in range(len(shards)):
            assert contents(dataset.document(number, 0)) == expected(number)
    assert len(dataset._readers) == OPEN_FILES


def test_the_same_documents_give_the_same_bytes(tmp_path):
    first, second = (write_shard(tmp_path / name, range(50)).read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40000]), "a.array_record is damaged: it has 40000 of 131072"),
        (lambda path: path.write_bytes(b""), "a.array_record is damaged: it has 0 of 131072 bytes"),
        (lambda path: path.write_bytes(bytes(131072)), "a.array_record is damaged: its index cannot be read"),
        (lambda path: path.unlink(), "a.array_record cannot be read: No such file"),
    ],
)
def test_damaged_shards(dataset, damage, message):
    damage(dataset.folder / "a.array_record")
    with pytest.raises(SampleError, match=message) as error:
        dataset.document(0, 3)
    assert error.value.cause == "bad_record"
    assert {document.cause for document in dataset.documents_of(0)} == {"bad_record"}
    assert contents(dataset.document(1, 0)) == expected(10)


def test_flipped_bits_cost_their_records_only(dataset):
    """Each flip either leaves every document as it was, or is reported for the one it is in."""
    path = dataset.folder / "a.array_record"
    whole, rng, found = path.read_bytes(), random.Random(1), 0
    for _ in range(100):
        content = bytearray(whole)
        content[rng.randrange(15000)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        documents = list(open_dataset(dataset.folder).documents_of(0))
        bad = [document for document in documents if isinstance(document, SampleError)]
        assert {error.cause for error in bad} <= {"bad_record"}
        found += bool(bad)
        good = [(n, document) for n, document in enumerate(documents) if isinstance(document, Document)]
        assert all(contents(document) == expected(number) for number, document in good)
    assert found >= 30  # the rest fell between the records


def test_records_that_are_none():
    record = pack_document(*make_document(2))
    assert contents(unpack_document(record, "here")) == expected(2)
    for bad in (b"", record[:3], record[:40], record[:-1], record + b"x", b"\xff\xff\xff\xff" + record[4:]):
        with pytest.raises(SampleError, match="here") as error:
            unpack_document(bad, "here")
        assert error.value.cause == "bad_record"


def test_folders_that_hold_no_dataset(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.json cannot be read: No such file"):
        open_dataset(tmp_path)
    for content, message in [
        ("{", "describes no dataset"),
        ('{"schema": 9, "shards": [], "fingerprint": ""}', "has schema 9; this program reads 1"),
        ('{"schema": 1, "shards": [{"file": "a"}], "fingerprint": ""}', "describes no dataset"),
        (
            '{"schema": 1, "shards": [{"file": "../a", "documents": 1, "bytes": 1, "sha256": ""}], "fingerprint": 1}',
            "outside",
        ),
    ]:
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            open_dataset(tmp_path)


def test_disk_that_takes_nothing():
    def write():
        with ShardWriter(Path("/dev/full")) as writer:
            for number in range(300):
                writer.write(make_document(number)[0], {"a": random.Random(number).randbytes(5000)})

    with pytest.raises(OSError, match=r"/dev/full cannot be written: .*No space left"):
        write()


def test_media_of_a_record_know_their_digest(dataset):
    media = dataset.document(0, 2).media["图/1.png"]
    assert isinstance(media, Media)
    assert media.content_hash() == Media("", None, media.data).content_hash()
