"""Commands with URLs in the place of paths: as with paths, and nothing of it lies where they were started."""

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.storage import parse_path
from baichuan_omni_jax.storage.given import local_copy
from tests.helpers.bucket import bucket_server, in_this_process
from tests.helpers.micro import contents, small_copy


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server, in_this_process(server):
        yield server


@pytest.fixture
def bucket(server, sample_dir, tmp_path, monkeypatch) -> str:
    """A manifest with media in a bucket, and an empty folder to work in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    files = fsspec.filesystem("gs")
    if files.exists("bucket/data/image.jsonl"):
        return "gs://bucket/data"
    root = small_copy(sample_dir, tmp_path / "root", 6)
    files.put(f"{root}/image.jsonl", "bucket/data/image.jsonl")
    files.put(f"{root}/images/", "bucket/data/images/", recursive=True)
    shutil.rmtree(root)
    return "gs://bucket/data"


def assert_clean(tmp_path: Path) -> None:
    """Neither a folder `gs:`, nor a scratch folder that should have gone."""
    assert list(Path.cwd().iterdir()) == []
    assert not [path for path in (tmp_path / "cache" / "baichuan_omni_jax" / "workdirs").glob("*") if path.is_dir()]


def test_a_data_set_is_built_checked_and_drawn_in_a_bucket(bucket, server, tmp_path, capsys):
    build = ["data", "build", f"{bucket}/image.jsonl", "--out", "gs://bucket/built", "--workers", "0"]
    assert main([*build, "--shard-documents", "2"]) == 0
    description = json.loads(server.read("built/dataset.json"))
    assert description["documents"] == 6
    assert {f"built/{shard['file']}" for shard in description["shards"]} <= {*server.names("built/")}
    assert_clean(tmp_path)

    assert main(["data", "validate", "gs://bucket/built", "--workers", "0", "--report", "gs://bucket/r/all.jsonl"]) == 0
    assert server.names("r/") == ["r/all.jsonl"]
    assert main(["data", "stats", "gs://bucket/built", f"{bucket}/image.jsonl", "--workers", "0"]) == 0
    assert "6" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="drawings need matplotlib (extra show)")
    draw = ["data", "visualize", f"{bucket}/image.jsonl", "--model", "tiny", "--out", "gs://bucket/drawn/row.png"]
    assert main(draw) == 0
    assert server.read("drawn/row.png").startswith(b"\x89PNG")
    assert_clean(tmp_path)


def test_a_build_in_a_bucket_goes_on_from_what_is_there(bucket, server, tmp_path):
    build = ["data", "build", f"{bucket}/image.jsonl", "--out", "gs://bucket/again", "--workers", "0"]
    assert main([*build, "--shard-documents", "2"]) == 0
    first = {name: server.read(name) for name in server.names("again/") if ".units" not in name}
    fsspec.filesystem("gs").rm(next(name for name in first if name.endswith("1.array_record")).join(["bucket/", ""]))
    assert main([*build, "--shard-documents", "2"]) == 0
    assert {name: server.read(name) for name in server.names("again/") if ".units" not in name} == first


def test_what_cannot_be_is_one_sentence_and_nothing_is_written(bucket, server, tmp_path, capsys):
    for command, sentence in {
        ("validate", "gs://bucket/none"): "gs://bucket/none cannot be read: there is no such file or folder",
        ("validate", "hdfs://bucket/none"): "hdfs:// cannot be read or written; a path, gs:// and s3:// can",
        ("stats", "--plot", "gs://nobody/a.png", f"{bucket}/image.jsonl"): "--plot gs://nobody cannot be written: ",
    }.items():
        assert main(["data", *command]) == 2
        assert sentence in capsys.readouterr().err
    assert_clean(tmp_path)


def test_a_copy_is_fetched_once_and_follows_its_origin(bucket, server, tmp_path):
    files = fsspec.filesystem("gs")
    files.pipe({f"bucket/copied/{name}": name.encode() for name in ("a", "b", "below/c")})
    copy = local_copy(parse_path("gs://bucket/copied"))
    before = contents(copy)
    assert {name: data for name, (_, data) in before.items()} == {"a": b"a", "b": b"b", "below/c": b"below/c"}
    files.pipe_file("bucket/copied/b", b"other")
    files.rm("bucket/copied/a")
    assert local_copy(parse_path("gs://bucket/copied")) == copy
    after = contents(copy)
    assert after["below/c"] == before["below/c"]  # not fetched again
    assert (copy / "b").read_bytes() == b"other"
    assert not (copy / "a").exists()
    assert local_copy(parse_path("gs://bucket/copied/below/c")).read_bytes() == b"below/c"


def test_some_files_of_a_folder_are_copied_alone(bucket, server, tmp_path):
    """They lie where a whole copy lies, and neither removes what the other has fetched."""
    fsspec.filesystem("gs").pipe({f"bucket/parted/{name}": name.encode() for name in ("a", "large/b", "c")})
    url = parse_path("gs://bucket/parted")

    def small(name: str) -> bool:
        return not name.startswith("large/")

    copy = local_copy(url, wanted=small)
    assert {*contents(copy)} == {"a", "c"}
    assert {*contents(local_copy(url))} == {"a", "c", "large/b"}
    local_copy(url, wanted=small)
    assert {*contents(copy)} == {"a", "c", "large/b"}
