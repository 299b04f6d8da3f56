"""Codes do not depend on devices or hosts: 8 devices, and two hosts that share the work, write the same store. Slow."""

import pytest

from tests.helpers.proofs import HANG
from tests.helpers.tokenized import copy_data, files_of, parts_of, run, start_hosts, without_store

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
    hosts = start_hosts(other, cache, 2)
    try:
        outputs = [process.communicate(timeout=HANG) for process in hosts]
    finally:
        for process in hosts:
            process.kill()
    assert [process.returncode for process in hosts] == [0, 0], outputs
    shares = [parts_of(root) - parts_of(root) // 2, parts_of(root) // 2]
    assert f"tokenizing audio: {shares[0]} of {shares[0]} shards" in outputs[0][0]
    assert "code frames" not in outputs[1][0], "only host 0 talks"
    assert files_of(other) == files_of(root)
