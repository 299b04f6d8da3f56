"""Codes do not depend on devices or hosts: 8 devices, and two hosts that share the work, write the same store. Slow."""

import pytest

from baichuan_omni_jax.storage import parse_path
from tests.helpers.bucket import bucket_server, in_this_process, put_data
from tests.helpers.tokenized import copy_data, files_of, outputs_of, parts_of, run, start_hosts, without_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def one(sample_dir, tmp_path_factory):
    """Data tokenised on one device, and compiled programs."""
    folder = tmp_path_factory.mktemp("tokenized")
    root = copy_data(sample_dir, folder / "data")
    run(root, folder / "xla")
    return root, folder / "xla"


@pytest.mark.parametrize("mesh", ["mesh.fsdp=8", "mesh.data=2"])
def test_eight_devices_write_the_same_store(mesh, one, tmp_path):
    root, cache = one
    other = without_store(root, tmp_path / "data")
    run(other, cache, "--set", mesh, devices=8)
    assert files_of(other) == files_of(root)


def test_two_hosts_write_the_same_store(one, tmp_path):
    root, cache = one
    other = without_store(root, tmp_path / "data")
    outputs = outputs_of(start_hosts(other, cache, 2))
    shares = [parts_of(root) - parts_of(root) // 2, parts_of(root) // 2]
    assert f"tokenizing audio: {shares[0]} of {shares[0]} shards" in outputs[0][0]
    assert "code frames" not in outputs[1][0], "only host 0 talks"
    assert files_of(other) == files_of(root)


def test_two_hosts_write_the_same_store_into_a_bucket(one, tmp_path, monkeypatch):
    """They share no disk: each has a cache of its own, and what one has made the other fetches."""
    root, cache = one
    with bucket_server() as server:
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        with in_this_process(server):
            url = put_data(root, parse_path("gs://bucket/data"))
        outputs = outputs_of(start_hosts(url, cache, 2, caches=[tmp_path / "0", tmp_path / "1"]))
        shares = [parts_of(root) - parts_of(root) // 2, parts_of(root) // 2]
        assert f"tokenizing audio: {shares[0]} of {shares[0]} shards" in outputs[0][0]
        names = [name for name in server.names("data/.cache/") if "/codes-" in name]
        # Neither marks nor listings are left beside it.
        assert not [name for name in names if "/." in name.removeprefix("data/.cache/")]
        store = next(iter(names)).split("/")[2]
        copy = server.download(f"data/.cache/{store}", tmp_path / "copy")
    found = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert found == files_of(root)
