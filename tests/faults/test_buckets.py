"""Runs in a bucket: killed, refused by its server or cut off from it, they end as one on a file system."""

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from baichuan_omni_jax.storage import parse_path
from tests.helpers.bucket import BucketServer, bucket_server, in_this_process, put_data
from tests.helpers.faults.uninterrupted import assert_same_run, resumed_from
from tests.helpers.faulty_proxy import faulty_proxy
from tests.helpers.micro import REPOSITORY, STEPS, environment, overrides, wait_until
from tests.helpers.proofs import HANG

FEW = 8  # steps of the run that is killed once
KILLS = 20
# Seconds over which kills of a start are spread, and those after a step is saved.
START_TIME, TRAINING_TIME = 8.0, 1.0
SERVER_DOWN = 30.0
# A stage of the smallest run that asks something.
STAGE = """
import runpy
from dataclasses import replace

from baichuan_omni_jax.config import EvalConfig
from baichuan_omni_jax.config.stages import held_out_of


def get_config():
    run = runpy.run_path({micro!r})["get_config"]()
    asked = EvalConfig(mixtures=(held_out_of(("text_qa",)),), abilities=("held_out",), ability_items=2)
    return replace(run, name={name!r}, eval=asked)
"""


@pytest.fixture(scope="module")
def server():
    with bucket_server() as server:
        yield server


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory, where a folder `gs:` would be seen, and a cache beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.fixture
def reach(server, monkeypatch) -> Callable[[str], None]:
    """Has the clients of processes that are started use the server, by way of a URL."""

    def reach(url: str = "") -> None:
        for name, value in server.variables(url).items():
            monkeypatch.setenv(name, value)

    reach()
    return reach


def finish(process: subprocess.Popen) -> str:
    with process:
        out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    return out


def assert_ends_as(server: BucketServer, name: str, reference: Path, folder: Path, steps: int) -> None:
    """As the reference bit for bit, with TensorBoard's files; nothing of it is on this machine."""
    assert_same_run(server.download(name, folder / name), reference, steps)
    assert server.names(f"{name}/tensorboard/")
    assert list(Path.cwd().iterdir()) == []
    scratch = folder / "cache" / "baichuan_omni_jax" / "workdirs"
    assert not any(path.is_dir() for path in scratch.iterdir())


def test_a_run_in_a_bucket_is_killed_and_goes_on(server, reach, quick_pretrain, elsewhere):
    steps = f"train.steps={FEW}"
    finish(quick_pretrain.start(elsewhere / "reference", steps))
    with quick_pretrain.start("gs://bucket/once", steps) as process:
        assert wait_until(process, lambda: bool(server.committed("once"))), process.communicate()
        process.kill()
    saved = server.committed("once")[-1]
    out = finish(quick_pretrain.start("gs://bucket/once", steps))
    assert resumed_from(out) == saved
    assert_ends_as(server, "once", elsewhere / "reference", elsewhere, FEW)
    # Killed after its last save, a run leaves its scratch folder, and the next start has nothing to do.
    scratch = elsewhere / "cache" / "baichuan_omni_jax" / "workdirs"
    (lock,) = scratch.iterdir()
    left = scratch / lock.name.replace("-run.lock", "-host_0")
    left.mkdir()
    finish(quick_pretrain.start("gs://bucket/once", steps))
    assert not left.exists()


def test_data_and_workdir_in_a_bucket_change_nothing(server, reach, quick_pretrain, elsewhere):
    steps = f"train.steps={FEW}"
    finish(quick_pretrain.start(elsewhere / "reference", steps))
    with in_this_process(server):
        data = put_data(quick_pretrain.root, parse_path("gs://bucket/data"))
    finish(quick_pretrain.start("gs://bucket/whole", steps, f"data.root={data}"))
    assert_ends_as(server, "whole", elsewhere / "reference", elsewhere, FEW)
    # Index and codes are in the bucket, for other machines.
    shared = server.names("data/.cache/")
    assert any(name.endswith("meta.json") for name in shared)
    assert any("/frames/c." in name for name in shared)


@pytest.mark.slow
def test_the_first_run_of_all_in_a_bucket(server, reach, pretrain, elsewhere):
    """`configs/tiny.py`, which makes its data itself, refused and cut off by the server now and then."""
    config, steps = REPOSITORY / "configs" / "tiny.py", ("train.steps=3", "data.sample=true")
    local = (f"data.root={elsewhere / 'data'}", *steps)
    finish(pretrain.start(elsewhere / "reference", *local, config=config))
    with faulty_proxy(server.url, refused=0.1) as proxy:
        reach(proxy.url)
        finish(pretrain.start("gs://bucket/tiny", "data.root=gs://bucket/sample", *steps, config=config))
        print(f"{proxy.faults} of {proxy.requests} requests failed")
        assert proxy.faults >= 10
    assert_ends_as(server, "tiny", elsewhere / "reference", elsewhere, 3)


@pytest.mark.slow
def test_a_server_that_refuses_data_changes_nothing(server, reach, quick_pretrain, elsewhere):
    steps = f"train.steps={FEW}"
    finish(quick_pretrain.start(elsewhere / "reference", steps))
    with in_this_process(server):
        data = put_data(quick_pretrain.root, parse_path("gs://bucket/data"))
    with faulty_proxy(server.url, refused=0.1) as proxy:
        reach(proxy.url)
        finish(quick_pretrain.start("gs://bucket/data_refused", steps, f"data.root={data}"))
        print(f"{proxy.faults} of {proxy.requests} requests failed")
        assert proxy.faults >= 10
    assert_ends_as(server, "data_refused", elsewhere / "reference", elsewhere, FEW)


def kill_at_random(process: subprocess.Popen, server: BucketServer, rng: random.Random) -> str:
    """Kills the process while it starts, while it saves, or some time after a save; returns which."""
    kind, before = rng.choice(["starting", "starting", "saving", "training"]), server.names("killed/checkpoints/")
    saved = server.committed("killed")
    with process:
        if kind == "starting":
            wait_until(process, lambda: False, rng.uniform(0, START_TIME))
        elif kind == "saving":
            # The first object of a save: the others are under way.
            wait_until(process, lambda: not {*server.names("killed/checkpoints/")} <= {*before})
        else:
            wait_until(process, lambda: server.committed("killed") != saved)
            time.sleep(rng.uniform(0, TRAINING_TIME))
        ended = process.poll() is not None
        process.kill()
        process.communicate(timeout=HANG)
    return "nothing" if ended else kind


@pytest.mark.slow
def test_killed_at_random_a_run_in_a_bucket_ends_as_the_uninterrupted_one(server, reach, pretrain, finished, elsewhere):
    rng, kinds, saved = random.Random(3), Counter(), []
    for _ in range(KILLS):
        kinds[kill_at_random(pretrain.start("gs://bucket/killed", f"train.steps={STEPS}"), server, rng)] += 1
        # A kill costs no step that was saved.
        assert max(server.committed("killed"), default=0) >= max(saved, default=0)
        saved = server.committed("killed")
    print(dict(kinds), saved)
    assert kinds["starting"] >= 1
    assert resumed_from(finish(pretrain.start("gs://bucket/killed", f"train.steps={STEPS}"))) == max(saved, default=0)
    assert_ends_as(server, "killed", finished, elsewhere, STEPS)


@pytest.mark.slow
def test_a_server_that_refuses_and_drops_requests_changes_nothing(server, reach, pretrain, finished, elsewhere):
    with faulty_proxy(server.url, refused=0.1, dropped=0.05) as proxy:
        reach(proxy.url)
        finish(pretrain.start("gs://bucket/refused", f"train.steps={STEPS}"))
        print(f"{proxy.faults} of {proxy.requests} requests failed")
        assert proxy.faults >= 10
    assert_ends_as(server, "refused", finished, elsewhere, STEPS)


@pytest.mark.slow
def test_a_server_that_is_down_for_a_while_changes_nothing(server, reach, pretrain, finished, elsewhere):
    with faulty_proxy(server.url) as proxy:
        reach(proxy.url)
        with pretrain.start("gs://bucket/down", f"train.steps={STEPS}") as process:
            assert wait_until(process, lambda: bool(server.committed("down"))), process.communicate()
            proxy.down = True
            time.sleep(SERVER_DOWN)
            proxy.down = False
            finish(process)
        assert proxy.faults
    assert_ends_as(server, "down", finished, elsewhere, STEPS)


@pytest.mark.slow
def test_stages_in_a_bucket_are_trained_asked_and_exported(server, reach, quick_pretrain, elsewhere):
    """Each from the weights of the one before; the last is asked, and read by the converter, where it is."""
    micro, url = str(REPOSITORY / "configs" / "micro.py"), "gs://bucket/chain"
    files = [elsewhere / f"{name}.py" for name in ("first", "second")]
    for file in files:
        file.write_text(STAGE.format(micro=micro, name=file.stem))

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "baichuan_omni_jax", *map(str, arguments)]
        variables = environment(quick_pretrain.cache, quick=True)
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=HANG, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sets = [part for change in (*overrides(quick_pretrain.root), "train.steps=2") for part in ("--set", change)]
    said = run("stages", "--workdir", url, *sets, *files)
    assert f"stage 2 of 2: second, from {url}/first" in said
    assert "text_qa" in said
    assert server.committed("chain/first") == server.committed("chain/second") == [2]
    assert f"{url}/first" in server.read("chain/second/parent.json").decode()
    assert b"text_qa" in server.read("chain/retention.md")
    assert b'"second"' in server.read("chain/chain.json")
    # Finished ones are passed over.
    assert "finished at step" not in run("stages", "--workdir", url, *sets, *files)

    assert "text_qa" in run(
        "evaluate", "abilities", "--run", f"{url}/second", "--out", "gs://bucket/asked", "--items", "3"
    )
    assert b'"items": 3' in server.read("asked/abilities.json")
    run("convert", "to-torch", "--from", f"{url}/second", "--to", elsewhere / "hf")
    copy = server.download("chain/second", elsewhere / "copy")
    run("convert", "to-torch", "--from", copy, "--to", elsewhere / "from_copy")
    weights = [(elsewhere / name / "model.safetensors").read_bytes() for name in ("hf", "from_copy")]
    assert weights[0] == weights[1]
    assert list(Path.cwd().iterdir()) == []
