"""Steps on a host's own disk: the newest good one is what a restart goes on from, if it is this run's."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.checkpoint.provenance import STARTS
from baichuan_omni_jax.config import CheckpointConfig, MeshConfig, RunConfig
from tests.checkpoint.test_checkpoint import abstract, assert_equal, damage, largest_file, make_state, save

RUN = RunConfig(name="a")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(tmp_path: Path, run: RunConfig = RUN, **options: object) -> Workdir:
    workdir = Workdir(tmp_path / "run", keep=2, **{"local": "", **options})
    workdir.write_run_config(run)
    return workdir


def keep(workdir: Workdir, *steps: int) -> None:
    """Step n holds the state of seed n."""
    for step in steps:
        workdir.save_local(step, *make_state(step), {"cursor": step})
        workdir._local.wait()


def saved(tmp_path: Path) -> Workdir:
    """Step 1 in the workdir, then 2, 3 and 4 on this host."""
    workdir = opened(tmp_path)
    save(workdir, 1, *make_state(1))
    workdir.wait()
    keep(workdir, 2, 3, 4)
    return workdir


def restored_step(workdir: Workdir) -> int:
    found = workdir.restore(None, *map(abstract, make_state()))
    assert_equal((found.branches, found.opt_state), make_state(found.step))
    # As `keep` or `save` gave it.
    assert found.data_state["cursor"] in (found.step, [found.step, {"bin": "二"}])
    return found.step


def local_folder(tmp_path: Path, step: int) -> Path:
    (folder,) = (tmp_path / "cache").rglob(str(step))
    return folder


def test_the_newest_step_of_this_host_is_gone_on_from(tmp_path):
    workdir = saved(tmp_path)
    assert workdir._local.steps() == [3, 4]
    workdir.close()
    assert restored_step(opened(tmp_path)) == 4
    # Without the setting, as before.
    assert restored_step(opened(tmp_path, local=None)) == 1


def test_a_damaged_one_is_passed_over(tmp_path, caplog):
    saved(tmp_path).close()
    path = largest_file(local_folder(tmp_path, 4) / "opt_state")
    damage(path, "flip")
    assert restored_step(opened(tmp_path)) == 3
    assert "step 4 on the hosts' own disks is not used: " in caplog.text
    assert str(path) in caplog.text
    shutil.rmtree(local_folder(tmp_path, 3) / "params")
    assert restored_step(opened(tmp_path)) == 1
    damage(local_folder(tmp_path, 4) / "step.json", "truncate")
    assert restored_step(opened(tmp_path)) == 1


def test_what_another_run_left_in_this_place_is_not_taken(tmp_path):
    workdir = saved(tmp_path)
    save(workdir, 5, *make_state(5))
    workdir.close()
    # As a user who removes the folder and begins anew, with steps of the same numbers.
    shutil.rmtree(tmp_path / "run")
    again = opened(tmp_path)
    save(again, 1, *make_state(1))
    again.wait()
    assert restored_step(again) == 1


def test_it_counts_only_on_top_of_what_the_workdir_has(tmp_path):
    workdir = opened(tmp_path)
    keep(workdir, 1)
    assert workdir._local.steps() == []
    save(workdir, 1, *make_state(1))
    save(workdir, 5, *make_state(5))
    workdir.wait()
    keep(workdir, 6)
    workdir.close()
    # As a user who goes back to step 1.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")
    assert restored_step(opened(tmp_path)) == 1


def test_a_later_save_takes_their_place(tmp_path):
    workdir = saved(tmp_path)
    save(workdir, 5, *make_state(5))
    workdir.wait()
    assert workdir._local.steps() == []
    assert restored_step(workdir) == 5


def test_a_disk_that_takes_nothing_costs_nothing_but_a_warning(tmp_path, caplog):
    workdir = saved(tmp_path)
    (workdir._local.folder / "5.partial").write_text("a file where the folder would be")
    keep(workdir, 5)
    assert "step 5 could not be kept in " in caplog.text
    assert restored_step(workdir) == 4


def test_every_start_is_recorded_with_what_changed(tmp_path):
    opened(tmp_path).close()
    moved = RunConfig(name="a", mesh=MeshConfig(fsdp=-1), checkpoint=CheckpointConfig(every=7))
    workdir = opened(tmp_path, moved)
    assert workdir.changes == "mesh.fsdp 1 -> -1, checkpoint.every 100 -> 7"
    record = json.loads((tmp_path / "run" / STARTS).read_text())
    changed = {"mesh.fsdp": [1, -1], "checkpoint.every": [100, 7]}
    assert [start["changed"] for start in record["starts"]] == [{}, changed]
    # A record that a crash cut costs no run.
    damage(tmp_path / "run" / STARTS, "truncate")
    assert opened(tmp_path, moved).changes == ""


def test_how_long_a_save_took_is_told_once(tmp_path):
    workdir = opened(tmp_path)
    assert workdir.take_times() == {}
    branches, opt_state = make_state(1)
    save(workdir, 1, branches, opt_state)
    workdir.wait()
    times = workdir.take_times()
    assert times["checkpoint_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves((branches, opt_state)))
    assert 0 < times["checkpoint_blocked_s"] <= times["checkpoint_s"]
    assert times["checkpoint_gb_per_s"] == pytest.approx(times["checkpoint_bytes"] / 1e9 / times["checkpoint_s"])
    assert workdir.take_times() == {}
