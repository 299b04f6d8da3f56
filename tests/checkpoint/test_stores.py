"""Checkpoints where folders cannot be renamed: in a bucket, and on a file system that refuses it."""

import errno
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from baichuan_omni_jax.checkpoint import Workdir, find_checkpoint, load_branches, read_branch_info, save_branches
from baichuan_omni_jax.checkpoint import workdir as workdirs
from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS
from baichuan_omni_jax.checkpoint.provenance import find_parent, find_tokenizer, newest_checkpoint, stored_tokenizer
from baichuan_omni_jax.config import RunConfig, tiny
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.nn.param import normal
from baichuan_omni_jax.storage import parse_path
from tests.helpers.bucket import BucketServer, bucket_server, in_this_process

TOKENIZER = '{"version": "1.0"}'


class Branch(nnx.Module):
    def __init__(self, key: jax.Array) -> None:
        self.table = normal(key, (16, 8), ("vocab", "embed"), std=1.0)


def make_branches(seed: int) -> dict[str, nnx.Module]:
    return {"llm": Branch(jax.random.key(seed))}


def abstract() -> dict[str, nnx.Module]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), make_branches(0))


def save(workdir: Workdir, step: int) -> None:
    """Step n holds the parameters of seed n."""
    workdir.save(step, make_branches(step), {"count": np.int32(step)}, {"cursor": step}, tiny(), TOKENIZER)


def assert_holds(workdir: Workdir, step: int) -> None:
    found = workdir.restore(None, abstract(), {"count": np.int32(0)})
    assert (found.step, found.data_state, int(found.opt_state["count"])) == (step, {"cursor": step}, step)
    expected = make_branches(step)["llm"].table
    np.testing.assert_array_equal(np.asarray(found.branches["llm"].table[...]), np.asarray(expected[...]))


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server, in_this_process(server):
        yield server


@pytest.fixture
def bucket(server: BucketServer, tmp_path, monkeypatch) -> str:
    """The URL of an empty workdir in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return f"gs://bucket/{tmp_path.name}"


@pytest.fixture
def no_renames(monkeypatch) -> None:
    """As Cloud Storage FUSE refuses folders in a bucket without hierarchical namespace."""
    rename = os.rename

    def refuse(source, target, **options) -> None:
        if os.path.isdir(source):
            raise OSError(errno.ENOTSUP, "Operation not supported")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)


@pytest.fixture(params=["bucket", "no renames"])
def place(request, tmp_path) -> str:
    name = request.param.replace(" ", "_")
    found = request.getfixturevalue(name)
    return found if name == "bucket" else str(tmp_path / "run")


def test_steps_are_saved_restored_kept_and_removed(place):
    workdir = Workdir(place, keep=2)
    assert not workdir.renames
    workdir.write_run_config(RunConfig(name="a"))
    for step in (1, 2, 3):
        save(workdir, step)
    workdir.wait()
    assert workdir.steps() == [2, 3]
    assert_holds(workdir, 3)
    workdir.close()
    again = Workdir(place, keep=2)
    again.write_run_config(RunConfig(name="a"))
    assert_holds(again, 3)
    again.close()


def test_what_a_kill_left_does_not_count_and_goes(place):
    workdir = Workdir(place, keep=2)
    workdir.write_run_config(RunConfig(name="a"))
    save(workdir, 1)
    save(workdir, 2)
    workdir.wait()
    save_branches(workdir.path / "audio_tokenizer", make_branches(0), tiny())
    # The last file of each is missing, as after a kill.
    (workdir.path / "checkpoints" / "2" / CHECKSUMS).unlink()
    (workdir.path / "audio_tokenizer" / CHECKSUMS).unlink()
    workdir.close()
    again = Workdir(place, keep=2)
    assert again.steps() == [1]
    assert find_checkpoint(place).name == "1"
    assert find_tokenizer(RunConfig(name="a"), again.path) is None
    again.write_run_config(RunConfig(name="a"))
    assert sorted(path.name for path in again.path.iterdir() if path.name != ".lock") == [
        "checkpoints",
        "run_config.json",
        "starts.json",
    ]
    assert [path.name for path in (again.path / "checkpoints").iterdir()] == ["1"]
    again.close()


def test_a_checkpoint_that_was_never_finished_is_refused(place):
    save_branches(place, make_branches(5), tiny(), trained={"llm": 3})
    (parse_path(place) / CHECKSUMS).unlink()
    with pytest.raises(ConfigError, match=r"was never finished: it has no checksums\.json"):
        find_checkpoint(place)
    assert newest_checkpoint(place) is None


def test_first_weights_and_tokenizer_come_from_a_bucket(bucket):
    save_branches(f"{bucket}/converted", make_branches(7), tiny(), TOKENIZER, trained={"llm": 3})
    loaded = load_branches(f"llm={bucket}/converted", abstract())
    np.testing.assert_array_equal(np.asarray(loaded["llm"].table[...]), np.asarray(make_branches(7)["llm"].table[...]))
    parent = find_parent(parse_path(f"{bucket}/new"), f"{bucket}/converted", ("llm",))
    assert parent.checkpoints == {"llm": f"{bucket}/converted"}
    assert parent.trained == {"llm": 3}
    assert stored_tokenizer(f"{bucket}/converted").read_text() == TOKENIZER
    assert read_branch_info(find_checkpoint(f"{bucket}/converted"))["llm"].trained == 3
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        save_branches(f"{bucket}/converted", make_branches(7), tiny())


def test_a_run_that_is_refused_gives_its_bucket_up(server, bucket):
    workdir = Workdir(bucket, keep=1)
    workdir.write_run_config(RunConfig(name="a"))
    workdir.give_up()
    assert server.names(bucket.removeprefix("gs://bucket/")) == []


def test_on_one_machine_a_bucket_belongs_to_one_run(bucket, caplog):
    first, second = Workdir(bucket, keep=1), Workdir(bucket, keep=1)
    first.hold()
    assert "a bucket, which has no locks" in caplog.text
    with pytest.raises(ConfigError, match=r"is in use by another run; nothing was changed \(process "):
        second.hold()
    first.close()
    second.hold()
    second.close()


def test_start_up_says_how_steps_are_committed(no_renames, tmp_path, caplog):
    Workdir(tmp_path, keep=1)
    assert "folders cannot be renamed there; a checkpoint counts once its checksums.json is written" in caplog.text


def test_a_whole_step_that_could_not_be_renamed_stays_until_a_later_one_is_saved(tmp_path, monkeypatch, caplog):
    """The probe found nothing: the file system changed its mind later."""
    workdir = Workdir(tmp_path, keep=1)
    assert workdir.renames
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", _refuse)
        save(workdir, 1)
        with pytest.raises(RunStoppedError, match=r"saving step 1 .* failed: .*not supported"):
            workdir.wait()
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert (left / CHECKSUMS).exists()
    assert f"{left} is a whole step that was not renamed" in caplog.text
    save(workdir, 2)
    workdir.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_a_failed_save_is_told_at_once_and_another_takes_its_place(tmp_path, monkeypatch, caplog):
    workdir = Workdir(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("baichuan_omni_jax.checkpoint.trees.write_checksums", _refuse)
        save(workdir, 1)
        workdir._saving.join()
        # Nobody has waited for it, nor saved again.
        assert "saving step 1" in caplog.text
        assert workdir.save_failed()
        assert workdir.may_retry()
    save(workdir, 2)
    assert not workdir.save_failed()
    workdir.close()
    assert workdir.steps() == [2]


def test_saves_that_fail_again_and_again_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("baichuan_omni_jax.checkpoint.trees.write_checksums", _refuse)
    workdir = Workdir(tmp_path, keep=1)
    for step in range(workdirs.TRIES):
        save(workdir, step)
    with pytest.raises(RunStoppedError, match=f"saving step {workdirs.TRIES - 1} .* failed"):
        save(workdir, workdirs.TRIES)
    assert list(Path(tmp_path / "checkpoints").iterdir()) == []
