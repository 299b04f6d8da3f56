"""JSONL manifests, good lines and bad ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_omni_jax.config import ConfigError
from data_pipelines.document import Document, SampleError
from data_pipelines.manifest import read_manifest, split_manifest

ROOT = Path(__file__).resolve().parents[2]


def test_documents_and_their_defaults(tmp_path):
    (tmp_path / "sub").mkdir()
    lines = ['\ufeff{"text": "a", "id": "x", "type": "asr"}', "", '{"text": "猫", "extra": 1}', '{"text": "", "id": 0}']
    (tmp_path / "sub/m.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [line.document for line in read_manifest("sub/m.jsonl", tmp_path)] == [
        Document(id="x", type="asr", text="a", where="sub/m.jsonl:1", media=tmp_path),
        Document(id="sub/m-3", type="", text="猫", where="sub/m.jsonl:3", media=tmp_path),
        Document(id="0", type="", text="", where="sub/m.jsonl:4", media=tmp_path),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "m.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}', "m.jsonl:2 is not JSON"),
        (b"[" * 100000, "m.jsonl:2 is not JSON"),
        (b'["a"]', "m.jsonl:2 is not an object but list"),
        (b'{"id": "a"}', 'm.jsonl:2 has no "text"'),
        (b'{"text": 3}', 'm.jsonl:2 has no "text"'),
        (b'{"text": "a", "id": "\\ud800"}', "m.jsonl:2: id or type is not Unicode"),
        (b'{"text": "a", "id": ["b"]}', 'm.jsonl:2: "id" is no text but list'),
        (b'{"text": "a", "type": {}}', 'm.jsonl:2: "type" is no text but dict'),
    ],
)
def test_bad_lines_are_told_with_their_number(tmp_path, line, message):
    (tmp_path / "m.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, (number, offset, error), last = read_manifest("m.jsonl", tmp_path)
    assert (first.document.text, last.document.text, number, offset) == ("a", "b", 2, 14)
    assert isinstance(error, SampleError)
    assert error.cause == "bad_json"
    assert message in str(error)


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
def test_ranges_hold_every_line_once(tmp_path, size):
    lines = [b'{"text": "a"}', b"", b'{"text": "bb"}', b"{", b'{"text": "\xe7\x8c\xab"}']
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\n".join(lines))
    ranges = list(split_manifest(path, "m.jsonl", tmp_path, size))
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


def test_data_workers_import_neither_jax_nor_librosa():
    code = (
        "import sys; import data_pipelines.processor, data_pipelines.manifest, data_pipelines.qwen_ranks;"
        "print([name for name in ('jax', 'flax', 'librosa', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
