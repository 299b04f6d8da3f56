"""A data root by URL gives the steps of the same data in a folder, and what one machine built the others find."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from baichuan_omni_jax.config import DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.cache import FileCache
from data_pipelines.audio_codes.build import CodeBuildOptions, CodeEncoder, open_or_build_shared
from data_pipelines.audio_codes.store import CodeStore
from data_pipelines.datasets.builder.build import build_dataset
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.datasets.sources import ManifestSource, read_fetched
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaBucket
from data_pipelines.packing.index import MeasurePart
from data_pipelines.pipeline import Pipeline, open_pipeline
from tests.data_pipelines.audio_codes.test_build import Encoder
from tests.data_pipelines.conftest import BUDGETS
from tests.data_pipelines.packing.test_rows import assert_same, read
from tests.helpers.bucket import bucket_server, in_this_process
from tests.helpers.micro import small_copy
from tests.helpers.windows import windows_of


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server, in_this_process(server):
        yield server


@pytest.fixture(scope="module")
def folder(sample_dir, tmp_path_factory) -> Path:
    """Two manifests with media, and a data set of shards of a third."""
    root = small_copy(sample_dir, tmp_path_factory.mktemp("data") / "root", 8)
    build_dataset([root / "image.jsonl"], root / "built", None, 3, 1 << 20, LocalRunner(0))
    return root


@pytest.fixture(scope="module")
def bucket(server, folder) -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".cache" not in path.parts]
    names = [f"bucket/data/{path.relative_to(folder).as_posix()}" for path in files]
    fsspec.filesystem("gs").put([str(path) for path in files], names)
    return "gs://bucket/data"


def config(root: str | Path, tmp_path: Path, **changes) -> DataConfig:
    mixture = tuple(SourceConfig(name=name, manifest=f"{name}.jsonl") for name in ("audio", "video"))
    mixture = (*mixture, SourceConfig(name="built", manifest="built"))
    options = {"rows": 2, "budgets": BUDGETS, "workers": 0, "cache": str(tmp_path / "cache"), "patience": 30.0}
    return DataConfig(root=str(root), mixture=mixture, **(options | changes))


def with_codes(pipeline: Pipeline) -> tuple[CodeStore, int]:
    encoder = Encoder()
    options = CodeBuildOptions(part_frames=512, report=lambda _: None)
    return open_or_build_shared([pipeline], CodeEncoder("a" * 32, encoder), options), encoder.windows


def test_steps_from_a_bucket_are_those_from_a_folder(folder, bucket, tmp_path, monkeypatch):
    local = open_pipeline(config(folder, tmp_path), tiny())
    codes, encoded = with_codes(local)
    steps = read(local, codes, 6)
    remote = open_pipeline(config(bucket, tmp_path), tiny())
    assert remote.fingerprint() == local.fingerprint()
    remote_codes, again = with_codes(remote)
    assert again == encoded > 0
    assert {key for key in windows_of(local) if key in remote_codes} == set(windows_of(local))
    remote_codes.verify()
    assert_same(read(remote, remote_codes, 6), steps)
    assert_same(read(replace(remote, config=replace(remote.config, workers=2)), remote_codes, 6), steps)
    middle = steps[2].state
    assert_same(read(remote, remote_codes, 3, state=middle), steps[3:])

    # Another machine measures and encodes nothing.
    monkeypatch.setattr(MeasurePart, "__call__", lambda *args: pytest.fail("measured again"))
    elsewhere = open_pipeline(config(bucket, tmp_path / "other"), tiny())
    found, encoded = with_codes(elsewhere)
    assert encoded == 0
    assert_same(read(elsewhere, found, 2), steps[:2])
    # Neither is there anything but the cache.
    assert {path.name for path in (tmp_path / "other" / "cache").iterdir()} == {"data", "files"}


def test_a_small_cache_gives_the_same_and_stays_small(folder, bucket, tmp_path):
    steps = read(open_pipeline(config(folder, tmp_path), tiny()), None, 4)
    limit = max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) + 50_000
    small = open_pipeline(config(bucket, tmp_path, cache_gb=limit / 2**30), tiny())
    assert_same(read(small, None, 4), steps)
    files = tmp_path / "cache" / "files"
    assert sum(path.stat().st_size for path in files.iterdir() if path.is_file() and path.name[0] != ".") <= limit


def test_what_is_missing_is_one_sentence(folder, bucket, tmp_path):
    files, paths = fsspec.filesystem("gs"), [path for path in (folder / "built").iterdir() if path.is_file()]
    files.put([str(path) for path in paths], [f"bucket/less/built/{path.name}" for path in paths])
    only = (SourceConfig(name="built", manifest="built"),)
    less = replace(config("gs://bucket/less", tmp_path), mixture=only)
    names = files.ls("bucket/less/built", detail=False)
    shard = next(name for name in names if name.endswith("00001.array_record"))
    whole = files.cat_file(shard)
    files.pipe_file(shard, whole[:-5])
    with pytest.raises(ConfigError, match=rf"{shard} was not copied whole: {len(whole) - 5} of {len(whole)} bytes"):
        open_pipeline(less, tiny())
    files.rm(shard)
    with pytest.raises(
        ConfigError, match=r"gs://bucket/less/built lacks .*-00001.array_record, which its dataset.json"
    ):
        open_pipeline(less, tiny())
    gone = replace(less, mixture=(SourceConfig(name="a", manifest="none.jsonl"),))
    with pytest.raises(ConfigError, match=r"manifest gs://bucket/less/none.jsonl cannot be read: there is no"):
        open_pipeline(gone, tiny())
    with pytest.raises(ConfigError, match=r"bytes, more than data.cache_gb allows"):
        open_pipeline(replace(config(bucket, tmp_path, cache_gb=1e-6), mixture=only), tiny())
    # As in a folder.
    local = shutil.copytree(folder / "built", tmp_path / "less" / "built")
    next(local.glob("*-00001.array_record")).unlink()
    with pytest.raises(ConfigError, match=r"less/built lacks .*-00001.array_record"):
        open_pipeline(replace(less, root=str(tmp_path / "less")), tiny())


def test_media_are_fetched_side_by_side_and_come_in_order(tmp_path):
    """Each fetch waits until two others are under way: one after the other would break the barrier."""
    lines = [{"text": f'<img_start_baichuan>{{"local": "{number}.png"}}<img_end_baichuan>'} for number in range(40)]
    lines[7] = {"text": 7}
    (tmp_path / "m.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    barrier, fetched = threading.Barrier(3), set()

    class Bucket(MediaBucket):
        def fetch(self, written: str) -> None:
            barrier.wait(60)
            fetched.add(written)
            if written == "3.png":
                raise OSError("gone")

    source = ManifestSource(
        "m.jsonl", tmp_path, tmp_path / "notes", Bucket("gs://bucket/x", FileCache(tmp_path / "files", 0))
    )
    seen = []
    for number, entry in enumerate(read_fetched(source, source.parts[0])):
        assert number == 7 or f"{number}.png" in fetched
        seen.append((entry.number, isinstance(entry.document, SampleError)))
    assert seen == [(number + 1, number == 7) for number in range(40)]
