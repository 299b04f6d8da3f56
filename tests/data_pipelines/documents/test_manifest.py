"""JSONL manifests, good lines and bad ones."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_omni_jax.config import DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.build import main as build
from data_pipelines.datasets.shards import open_dataset
from data_pipelines.documents.document import Document
from data_pipelines.documents.manifest import plain_manifest, read_manifest, split_manifest
from data_pipelines.documents.processor import Processor
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaRoot
from data_pipelines.packing.index import load_index
from data_pipelines.pipeline import open_pipeline
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from data_pipelines.tools.stats import main as stats

ROOT = Path(__file__).resolve().parents[3]


def test_documents_and_their_defaults(tmp_path):
    (tmp_path / "sub").mkdir()
    lines = ['\ufeff{"text": "a", "id": "x", "type": "asr"}', "", '{"text": "猫", "extra": 1}', '{"text": "", "id": 0}']
    (tmp_path / "sub/m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [line.document for line in read_manifest("sub/m.jsonl", tmp_path)] == [
        Document(id="x", type="asr", text="a", location="sub/m.jsonl:1", media=MediaRoot(tmp_path / "sub")),
        Document(id="sub/m-3", type="", text="猫", location="sub/m.jsonl:3", media=MediaRoot(tmp_path / "sub")),
        Document(id="0", type="", text="", location="sub/m.jsonl:4", media=MediaRoot(tmp_path / "sub")),
    ]


@pytest.mark.parametrize(
    ("line", "cause", "message"),
    [
        (b'{"text": "a"', "bad_json", "m.jsonl:2 is not JSON: Expecting ',' delimiter at character 13"),
        (b'{"text": "\xff"}', "bad_json", "m.jsonl:2 is not JSON: byte 11 is not UTF-8"),
        (b"[" * 100000, "bad_json", "m.jsonl:2 is not JSON: it is nested too deeply"),
        (b"[", "bad_json", "m.jsonl:2 is not JSON: it ends after [: each document is one object on one line"),
        (b'{"text": "a"}{"text": "b"}', "bad_json", "more follows after character 13: each document is one object on"),
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "bad_json", "a number has too many digits"),
        (b'["a"]', "bad_form", 'm.jsonl:2 is a list, not an object with "text"'),
        (b"[]", "bad_form", 'm.jsonl:2 is a list, not an object with "text"'),
        (b"3.5", "bad_form", 'm.jsonl:2 is a number, not an object with "text"'),
        (b'"a"', "bad_form", 'm.jsonl:2 is a text, not an object with "text"'),
        (b"null", "bad_form", 'm.jsonl:2 is null, not an object with "text"'),
        (b"true", "bad_form", 'm.jsonl:2 is true, not an object with "text"'),
        (b"{}", "bad_form", 'm.jsonl:2 has no "text": it is empty'),
        (b'{"id": "a", "x": 1}', "bad_form", 'm.jsonl:2 has no "text" but "id", "x"'),
        (b'{"messages": []}', "bad_form", 'm.jsonl:2 has no "text" but "messages": a chat in OpenAI\'s form'),
        (b'{"id": 1, "conversations": []}', "bad_form", "but \"conversations\": a chat in ShareGPT's or LLaVA's form"),
        (b'{"text": 3}', "bad_form", 'm.jsonl:2: "text" is a number, not a text'),
        (b'{"text": null}', "bad_form", 'm.jsonl:2: "text" is null, not a text'),
        (b'{"text": [{"role": "user"}]}', "bad_form", 'm.jsonl:2: "text" is a list, not a text'),
        (b'{"text": "a", "id": "\\ud800"}', "bad_form", "m.jsonl:2: id or type is not Unicode"),
        (b'{"text": "a", "id": ["b"]}', "bad_form", 'm.jsonl:2: "id" is a list, not a text'),
        (b'{"text": "a", "type": {}}', "bad_form", 'm.jsonl:2: "type" is an object, not a text'),
    ],
)
def test_bad_lines_are_told_with_their_number_and_cause(tmp_path, line, cause, message):
    (tmp_path / "m.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, (number, offset, error), last = read_manifest("m.jsonl", tmp_path)
    assert (first.document.text, last.document.text, number, offset) == ("a", "b", 2, 14)
    assert isinstance(error, SampleError)
    assert error.cause == cause
    assert message in str(error)


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
def test_ranges_hold_every_line_once(tmp_path, size):
    lines = [b'{"text": "a"}', b"", b'{"text": "bb"}', b"{", b'{"text": "\xe7\x8c\xab"}']
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(lines))
    ranges = list(split_manifest(path, "m.jsonl", MediaRoot(tmp_path), size))
    assert sum(one.length for one in ranges) == path.stat().st_size
    found = [line for one in ranges for line in one.documents()]
    expected = list(read_manifest("m.jsonl", tmp_path))
    assert [(line.number, line.offset, str(line.document)) for line in found] == [
        (line.number, line.offset, str(line.document)) for line in expected
    ]
    assert len(ranges) == {1: 5, 7: 3, 20: 2, 1000: 1}[size]


def test_no_manifest(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read: No such file"):
        list(read_manifest("none.jsonl", tmp_path))


LINES = [
    b'{"id": "a", "text": "a"}',
    b"",
    '{"text": "猫"}'.encode(),
    b'{"messages": []}',
    b"{ oh",
    b'{"id": "z", "text": "z"}',
]
PLAIN = b"\r\n".join(LINES) + b"\n"


def compress(form: str, content: bytes) -> bytes:
    """As these tools write it; `frames` are several, as parallel compressors and `cat` make them."""
    zstd = pytest.importorskip("zstandard") if "zst" in form else None
    half = len(content) // 2
    return {
        "gz": lambda: gzip.compress(content),
        "gz members": lambda: gzip.compress(content[:half]) + gzip.compress(content[half:]),
        "zst": lambda: zstd.ZstdCompressor().compress(content),
        "zst without size": lambda: zstd.ZstdCompressor(write_content_size=False).compress(content),
        "zst frames": lambda: (
            zstd.ZstdCompressor(write_checksum=True).compress(content[:half])
            + b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a frame to be passed over
            + zstd.ZstdCompressor().compress(content[half:])
        ),
        "zst begins passed over": lambda: b"\x5f\x2a\x4d\x18\x00\x00\x00\x00" + zstd.ZstdCompressor().compress(content),
    }[form]()


FORMS = ("gz", "gz members", "zst", "zst without size", "zst frames", "zst begins passed over")


@pytest.mark.parametrize("form", FORMS)
def test_compressed_manifests_are_read_as_the_plain_one(tmp_path, form):
    """By their content, whatever the ending says; ids are those of the plain manifest, places count its bytes."""
    (tmp_path / "m.jsonl").write_bytes(PLAIN)
    name = f"m.jsonl.{form.split()[0]}"
    (tmp_path / name).write_bytes(compress(form, PLAIN))
    shutil.copy(tmp_path / name, tmp_path / "bare")
    expected = list(read_manifest("m.jsonl", tmp_path))
    found = list(read_manifest(name, tmp_path))
    assert [(line.number, line.offset) for line in found] == [(line.number, line.offset) for line in expected]
    assert [getattr(line.document, "id", None) for line in found] == ["a", "m-3", None, None, "z"]
    assert [getattr(line.document, "cause", None) for line in found] == [None, None, "bad_form", "bad_json", None]
    for size in (1, 30, 1000):
        ranges = list(split_manifest(tmp_path / name, name, MediaRoot(tmp_path), size))
        assert [line.document for one in ranges for line in one.documents() if hasattr(line.document, "text")] == [
            line.document for line in found if hasattr(line.document, "text")
        ]
    copy = plain_manifest(tmp_path / "bare", "bare", tmp_path / "copies")
    assert copy.read_bytes() == PLAIN
    assert plain_manifest(tmp_path / "bare", "bare", tmp_path / "copies") == copy
    assert os.listdir(tmp_path / "copies") == [copy.name]
    assert plain_manifest(tmp_path / "m.jsonl", "m", tmp_path / "copies") == tmp_path / "m.jsonl"


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_damaged_compressed_manifests_are_one_sentence(tmp_path, form, capsys):
    content = b"".join(
        json.dumps({"text": hashlib.sha256(bytes([i])).hexdigest()}).encode() + b"\n" for i in range(200)
    )
    (tmp_path / "copies").mkdir()
    whole = compress("gz" if form == "gz" else "zst frames", content)
    for size in (5, len(whole) // 3, len(whole) - 1):
        (tmp_path / "m.jsonl").write_bytes(whole[:size])
        with pytest.raises(
            ConfigError, match=r"^manifest m\.jsonl is damaged: its (gzip|zstd) data are cut or changed$"
        ):
            list(read_manifest("m.jsonl", tmp_path))
        assert build([str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(ConfigError, match=r"m\.jsonl is damaged"):
            plain_manifest(tmp_path / "m.jsonl", "m.jsonl", tmp_path / "copies")
        assert os.listdir(tmp_path / "copies") == []
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 0xFF
    (tmp_path / "m.jsonl").write_bytes(changed)
    with pytest.raises(ConfigError, match=r"m\.jsonl is damaged"):
        list(read_manifest("m.jsonl", tmp_path))


def test_marks_and_line_ends_of_joined_manifests(tmp_path):
    """A byte order mark before any line, also alone on one; Windows line ends; empty lines that hold blanks."""
    bom = b"\xef\xbb\xbf"
    lines = [bom + b'{"text": "a"}', bom, b" \t", bom + bom + b' {"text": "b"}', bom + b'  {"text": "c"}  ', bom + b"{"]
    (tmp_path / "m.jsonl").write_bytes(b"\r\n".join(lines) + b"\r\n")
    *good, bad = read_manifest("m.jsonl", tmp_path)
    assert [(line.number, line.document.text) for line in good] == [(1, "a"), (4, "b"), (5, "c")]
    assert (bad.number, bad.document.cause) == (6, "bad_json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, encoding):
    content = '{"text": "猫"}\n'.encode(encoding)
    for data in (content, gzip.compress(content)):
        (tmp_path / "m.jsonl").write_bytes(data)
        with pytest.raises(ConfigError, match=r"^manifest m\.jsonl is a text in UTF-16, not UTF-8: convert it"):
            list(read_manifest("m.jsonl", tmp_path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PAR1" + bytes(50), "a Parquet file"),
        (b"PK\x03\x04" + bytes(50), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer to a file in Git LFS"),
        (b"<!DOCTYPE html><html>", "a page of HTML"),
        (b"BZh91AY&SY", "a bzip2 file"),
        (bytes(100), "a file of zeros"),
    ],
)
def test_files_that_are_no_manifests_are_named(tmp_path, content, what):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^manifest m\.jsonl is {what}"):
        list(read_manifest("m.jsonl", tmp_path))


@pytest.mark.parametrize("form", ["gz", "zst frames"])
def test_a_compressed_source_is_planned_and_built_as_the_plain_one(tmp_path, form, monkeypatch):
    """The same shards' documents and the same index, byte for byte, also in parts and after the copy was lost."""
    texts = [f"<trainable_start>{'word ' * (i % 7 + 1)}{i}<trainable_end>" for i in range(300)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    name = f"m.jsonl.{form.split()[0]}"
    for folder, file, data in (("plain", "m.jsonl", content), ("packed", name, compress(form, content))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_bytes(data)
    monkeypatch.setattr("data_pipelines.datasets.sources.PART_BYTES", 4000)
    processor = Processor(tiny(), train_tokenizer(["word"], tiny().llm.vocab_size))
    indexes = []
    for folder, file in (("plain", "m.jsonl"), ("packed", name)):
        config, source = DataConfig(root=str(tmp_path / folder)), SourceConfig(name="a", manifest=file)
        indexes.append(load_index(config, source, processor))
    plain, packed = indexes
    assert (packed.digest, packed.source.fingerprint) == (plain.digest, plain.source.fingerprint)
    assert packed.columns.places.tolist() == plain.columns.places.tolist()
    for copy in (tmp_path / "packed/.cache").glob("*.lines"):
        copy.unlink()
    again = load_index(config, source, processor)
    for number in (299, 0, 150):
        assert again.document(number).text == plain.document(number).text == texts[number]
        assert again.document(number).id == plain.document(number).id == f"m-{number + 1}"
    arguments = ["--workers", "0", "--shard-documents", "70", "--out"]
    for folder, file in (("plain", "m.jsonl"), ("packed", name)):
        assert build([str(tmp_path / folder / file), *arguments, str(tmp_path / f"{folder}-out")]) == 0
    built = [open_dataset(tmp_path / f"{folder}-out") for folder in ("plain", "packed")]
    assert [shard.file for shard in built[0].shards] == [shard.file for shard in built[1].shards]
    for shard in range(5):
        ours, others = (list(one.documents_of(shard)) for one in built)
        assert [(one.id, one.text) for one in ours] == [(one.id, one.text) for one in others]
    assert not (tmp_path / "packed-out/.units/manifests").exists()


def test_causes_are_told_on_the_terminal_with_the_first_line_of_each(tmp_path, capsys, caplog):
    lines = [*[b'{"messages": [{"role": "user"}]}'] * 3, b"{ oh", b'{"text": "<img_start_baichuan>"}', b'{"text": "a"}']
    (tmp_path / "m.jsonl").write_bytes(b"\n".join(lines))
    told = [
        '3 bad_form, the first: m.jsonl:1 has no "text" but "messages": a chat in OpenAI\'s form; write each document',
        "1 bad_json, the first: m.jsonl:4 is not JSON: Expecting property name",
        "1 bad_prompt, the first: m.jsonl:5: <img_start_baichuan> is never closed",
    ]
    assert build([str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "5 documents are skipped:" in printed
    assert stats([str(tmp_path / "m.jsonl"), "--workers", "0"]) == 0
    measured = capsys.readouterr().out
    data = DataConfig(
        root=str(tmp_path), mixture=(SourceConfig(name="main", manifest="m.jsonl"),), workers=0, max_bad_fraction=1.0
    )
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([*lines[:-1], b'{"text": "<trainable_start>a<trainable_end>"}']))
    open_pipeline(data, tiny())
    for sentence in told:
        assert f"  {sentence}" in printed
        assert f"  {sentence}" in measured
        assert f"source main: {sentence}" in caplog.text


def test_data_workers_import_neither_jax_nor_librosa():
    code = (
        "import sys; import data_pipelines.documents.processor, data_pipelines.documents.manifest;"
        "import data_pipelines.tokenizers.tokenizer;"
        "print([name for name in ('jax', 'flax', 'librosa', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
