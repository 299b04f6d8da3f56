"""Reading a dataset through: nothing wrong, files cut or changed, media that do not decode, double ids."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.datasets.builder.build import build_dataset
from data_pipelines.datasets.shards import ShardFile, ShardWriter, open_dataset, pack_document, write_description
from data_pipelines.tools.commands import make_runner
from data_pipelines.tools.validate import Problem, main, validate
from tests.helpers.small_media import write_audio, write_image, write_video

PICTURE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan>'
HEARD = '<audio_start_baichuan>{"path": "%s"}<audio_end_baichuan>'
VIDEO = '<video_start_baichuan>{"local": "%s"}<video_end_baichuan>'


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Three shards: two pictures and a text, a sound and a video, a picture whose end is missing and a NaN."""
    root = tmp_path_factory.mktemp("corpus")
    write_image(root / "a.png", 40, 60)
    write_audio(root / "s.wav", 1.0)
    write_video(root / "v.mp4", 2)
    picture = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(picture[: len(picture) // 2])  # its header is whole
    soundfile.write(root / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    shards = [
        [PICTURE % "a.png", "text", PICTURE % "a.png"],
        [HEARD % "s.wav", VIDEO % "v.mp4"],
        [PICTURE % "cut.png", HEARD % "nan.wav"],
    ]
    manifests = []
    for name, texts in zip("abc", shards, strict=True):
        manifests.append(root / f"{name}.jsonl")
        lines = [json.dumps({"id": f"{name}{i}", "text": text}) for i, text in enumerate(texts)]
        manifests[-1].write_text("\n".join(lines))
    build_dataset(manifests, root / "out", None, 10, 1 << 20, make_runner("local", 0))
    return root / "out"


@pytest.fixture
def copy(built, tmp_path) -> Path:
    return shutil.copytree(built, tmp_path / "dataset")


def check(folder: Path, workers: int = 0) -> list[Problem]:
    return validate(open_dataset(folder), make_runner("local", workers))


def causes(problems: list[Problem]) -> list[tuple[str, str | None, str]]:
    return [(problem.where, problem.id, problem.cause) for problem in problems]


BAD = [
    ("c-00000.array_record record 0", "c0", "unreadable_media"),
    ("c-00000.array_record record 1", "c1", "unreadable_media"),
]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_media_that_do_not_decode(built, workers):
    found = check(built, workers)
    assert causes(found) == BAD
    assert "truncated" in found[0].message
    assert "not finite" in found[1].message
    assert not list(built.glob(".validate*"))


def test_a_damaged_packet_of_audio_is_reported(tmp_path):
    """Its document can be used all the same."""
    data = bytearray(write_audio(tmp_path / "s.flac", 3.0).read_bytes())
    data[len(data) // 2] ^= 0x55
    (tmp_path / "s.flac").write_bytes(data)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": HEARD % "s.flac"}))
    build_dataset([tmp_path / "a.jsonl"], tmp_path / "out", None, 10, 1 << 20, make_runner("local", 0))
    (found,) = check(tmp_path / "out")
    assert (found.id, found.cause) == ("a", "damaged_packets")
    assert "s.flac: 1 packets are damaged" in found.message


def test_cut_shard(copy):
    path = copy / "b-00000.array_record"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = check(copy)
    assert causes(found) == [
        ("b-00000.array_record", None, "bad_checksum"),
        ("b-00000.array_record record 0", None, "bad_record"),
        ("b-00000.array_record record 1", None, "bad_record"),
        *BAD,
    ]
    assert f"it has {path.stat().st_size} of" in found[0].message


def test_flipped_bit(copy):
    """In the middle of the first picture: the checksum tells, and the record; the others are read."""
    path = copy / "a-00000.array_record"
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    assert causes(check(copy)) == [
        ("a-00000.array_record", None, "bad_checksum"),
        ("a-00000.array_record record 0", None, "bad_record"),
        *BAD,
    ]


def test_bytes_that_are_not_what_the_record_says(copy):
    """A record that was written with another medium under the old digest: ArrayRecord sees nothing wrong."""
    document = open_dataset(copy).document(0, 0)
    record = pack_document(document, {"a.png": document.media["a.png"].data})
    path = copy / "new.array_record"
    with ShardWriter(path) as writer:
        writer._writer.write(record[:-1] + bytes([record[-1] ^ 1]))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    write_description(copy, [ShardFile(path.name, 1, path.stat().st_size, digest)], {})
    (problem,) = check(copy)
    assert (problem.id, problem.cause) == ("a0", "bad_record")
    assert problem.message == "a.png is not what was written"


def test_double_ids(copy):
    shutil.copy(copy / "a-00000.array_record", copy / "again.array_record")
    dataset = open_dataset(copy)
    first = dataset.shards[0]
    again = ShardFile("again.array_record", first.documents, first.bytes, first.sha256)
    write_description(copy, [first, again], {})
    found = check(copy)
    assert causes(found) == [(f"again.array_record record {i}", f"a{i}", "duplicate_id") for i in range(3)]
    assert found[1].message == "a-00000.array_record record 1 has the same id"


def test_a_decoder_that_crashes(copy, monkeypatch):
    """What the process of a shard took with it is reported of the shard; others are read."""

    def runner(job, units):
        for unit, outcome in make_runner("local", 0)(job, units):
            yield unit, RuntimeError("the process died") if unit.name == "shard-00000" else outcome

    found = validate(open_dataset(copy), runner)
    assert causes(found) == [("a-00000.array_record", None, "crash"), *BAD]


def test_the_command(built, tmp_path, capsys):
    report = tmp_path / "report.jsonl"
    assert main([str(built), "--workers", "0", "--report", str(report)]) == 1
    printed = capsys.readouterr().out
    assert "unreadable_media: 2" in printed
    assert "c-00000.array_record record 0 id 'c0': cut.png is not a readable image" in printed
    assert printed.endswith("7 documents in 3 shards, 2 problems\n")
    assert [json.loads(line)["id"] for line in report.read_text().splitlines()] == ["c0", "c1"]
    assert main([str(tmp_path), "--workers", "0"]) == 2
    assert "dataset.json cannot be read" in capsys.readouterr().err


def test_nothing_wrong(tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text('{"text": "a"}\n')
    build_dataset([tmp_path / "m.jsonl"], tmp_path / "out", None, 10, 1 << 20, make_runner("local", 0))
    assert main([str(tmp_path / "out"), "--workers", "0"]) == 0
    assert capsys.readouterr().out.endswith("1 documents in 1 shards, nothing is wrong\n")
