"""Arrays of checkpoints: every changed byte is noticed by whoever needs it, and nobody reads one only to notice."""

import json
import random
import shutil
from pathlib import Path

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from baichuan_omni_jax.checkpoint import Workdir, load_branches, save_branches, verify_checksums
from baichuan_omni_jax.checkpoint import checksums as sums
from baichuan_omni_jax.checkpoint.arrays import CHUNK_BYTES, chunk_shape
from baichuan_omni_jax.checkpoint.trees import stored_names
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import ConfigError
from tests.checkpoint.test_checkpoint import abstract, assert_equal, largest_file, make_state, save
from tests.helpers.io_counts import io_counts


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A workdir with step 1 of `make_state(1)`."""
    workdir = Workdir(tmp_path_factory.mktemp("arrays") / "run", keep=1)
    save(workdir, 1, *make_state(1))
    workdir.close()
    return Path(workdir.path)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def flip(path: Path, place: int) -> bytes:
    """Changes one bit; returns what the file was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[place] ^= 1 << place % 8
    path.write_bytes(changed)
    return before


def test_no_flipped_bit_gets_into_a_restored_state(saved):
    """Wherever it is: it is found and its file named, or nobody reads it."""
    branches, opt_state = make_state(1)
    rng, found = random.Random(0), 0
    # Orbax's own notes are not read, and checksums.json has nothing that says what it must be but JSON itself.
    unread = {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}
    for path in (path for path in files_of(saved / "checkpoints" / "1") if path.name not in unread):
        size = path.stat().st_size
        for place in {size // 2, *rng.choices(range(size), k=1)}:
            before = flip(path, place)
            workdir = Workdir(saved, keep=1)
            error = ""
            try:
                restored = workdir.restore(None, abstract(branches), abstract(opt_state))
            except ConfigError as raised:
                error = str(raised)
            path.write_bytes(before)
            workdir.close()
            if error:
                assert f"{path} is missing or changed" in error
                found += 1
            else:
                assert_equal((restored.branches, restored.opt_state), (branches, opt_state))
    # Not found: what each host's own index says, once there is one of all hosts.
    assert found >= 10


def test_a_flipped_bit_of_an_array_is_named_by_tensor_and_file(saved):
    path = largest_file(saved / "checkpoints" / "1" / "params" / "llm")
    before = flip(path, path.stat().st_size // 2)
    try:
        target = abstract(make_state()[0])
        with pytest.raises(ConfigError, match=rf"branch llm of \S*: tensor \S+ in {path} is missing or changed \("):
            load_branches(str(saved), {"llm": target["llm"]})
        assert str(path) in verify_checksums(saved / "checkpoints" / "1")
        # Nobody who wants the other branch has to do with it.
        assert_equal(load_branches(str(saved), {"vision": target["vision"]})["vision"], make_state(1)[0]["vision"])
    finally:
        path.write_bytes(before)
    assert verify_checksums(saved / "checkpoints" / "1") is None


def test_parameters_are_read_without_the_optimizer_state(saved, monkeypatch):
    """Neither to verify nor otherwise."""
    opened = []
    for name in ("_size", "_crc32c"):
        real = getattr(sums, name)
        monkeypatch.setattr(sums, name, lambda path, real=real: opened.append(str(path)) or real(path))
    load_branches(str(saved), abstract(make_state()[0]))
    assert opened
    assert not [path for path in opened if "/opt_state/" in path]


def big_branch(megabytes: int) -> dict[str, jax.Array]:
    return {"table": jnp.arange(megabytes << 18, dtype=jnp.float32).reshape(-1, 1 << 10), "scale": jnp.ones(())}


def test_a_save_reads_nothing_back_and_a_restore_reads_once(tmp_path):
    branch = big_branch(160)
    before = io_counts()
    save_branches(tmp_path / "ckpt", {"llm": branch}, tiny())
    written = io_counts()
    assert written.write - before.write >= 160 << 20
    assert written.read - before.read <= 0.01 * (written.write - before.write)
    loaded = load_branches(str(tmp_path / "ckpt"), {"llm": abstract(branch)})
    assert io_counts().read - written.read <= 1.01 * (160 << 20)
    assert_equal(loaded["llm"], branch)


def test_chunks_divide_the_part_of_a_host():
    for shape, itemsize in (((48, 7168, 8192), 4), ((152064, 3584), 4), ((3, 5), 4), ((), 4), ((0, 4), 2)):
        chunk = chunk_shape(shape, itemsize)
        assert np.prod(chunk, dtype=np.int64) * itemsize <= CHUNK_BYTES
        assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
    # A prime that is too long: no chunk may cross two hosts' parts.
    assert chunk_shape((2_147_483_647,), 1) == (1,)


def as_older_version_wrote(folder: Path, branches: dict, opt_state: object) -> None:
    """Orbax's own arrays (zarr 2, without checksums) for ours, and a crc32c of every file."""
    writer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    trees = {f"params/{name}": stored_names(branch) for name, branch in branches.items()}
    trees["opt_state"] = stored_names(opt_state)
    for name, named in trees.items():
        shutil.rmtree(folder / name)
        nested: dict = {}
        for key, value in named.items():
            *parents, last = key.split(".")
            level = nested
            for parent in parents:
                level = level.setdefault(parent, {})
            level[last] = value
        writer.save(folder / name, args=ocp.args.PyTreeSave(nested))
    writer.close()
    files = [path for path in files_of(folder) if path.name not in {"checksums.json", "_CHECKPOINT_METADATA"}]
    crcs = {
        str(path.relative_to(folder)): google_crc32c.Checksum(path.read_bytes()).hexdigest().decode() for path in files
    }
    (folder / "checksums.json").write_text(json.dumps(crcs))


def test_checkpoints_of_older_versions_are_read_and_verified(tmp_path):
    workdir = Workdir(tmp_path / "run", keep=2)
    branches, opt_state = make_state(1)
    save(workdir, 1, branches, opt_state)
    workdir.wait()
    folder = tmp_path / "run" / "checkpoints" / "1"
    as_older_version_wrote(folder, branches, opt_state)
    restored = workdir.restore(None, abstract(branches), abstract(opt_state))
    assert_equal((restored.branches, restored.opt_state), (branches, opt_state))
    assert_equal(load_branches(str(folder), abstract(branches)), branches)
    assert verify_checksums(folder) is None
    path = largest_file(folder / "params" / "llm")
    flip(path, path.stat().st_size // 2)
    for read in (
        lambda: workdir.restore(None, abstract(branches), abstract(opt_state)),
        lambda: load_branches(str(folder), abstract(branches)),
    ):
        with pytest.raises(ConfigError, match=rf"{path.name} is missing or changed"):
            read()
