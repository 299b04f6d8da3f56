"""Two processes of four CPU devices each train as one of eight does, stop together, and refuse to disagree. Slow."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from baichuan_omni_jax.checkpoint import Workdir
from tests.helpers.bucket import bucket_server
from tests.helpers.micro import LINES, Command, read_metrics, small_copy
from tests.helpers.proofs import HANG

pytestmark = pytest.mark.slow

# Rows over both hosts, and over the context axis within each.
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.context=2", "data.media_shards=2")
# Every row lies on both hosts: context shards 0 and 1 on one, 2 and 3 on the other.
SPLIT_ROWS = ("mesh.context=4", "mesh.tensor=2", "data.media_shards=8", "data.budgets.patches=1024")
SHARED = ("data.rows=8", "data.context_block=64", "train.steps=4")
# Relative, fp32: sums are taken in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def command(sample_dir, tmp_path_factory) -> Command:
    """Two processes on one machine's cores compile most of the time: with few optimizations."""
    folder = tmp_path_factory.mktemp("hosts")
    return Command(small_copy(sample_dir, folder / "data"), folder / "xla", quick=True)


def start(command: Command, workdir: Path | str, *changes: str, of_host=((), ())) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ("--multihost", f"--coordinator=localhost:{port}", "--hosts=2")
    return [
        command.start(workdir, *SHARED, *changes, *own, *flags, f"--host={host}", devices=4)
        for host, own in enumerate(of_host)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("mesh", [MESH, SPLIT_ROWS], ids=["rows", "context"])
def test_two_hosts_train_as_one(mesh, command, tmp_path):
    one = command(tmp_path / "one", *SHARED, *mesh, devices=8)
    assert one.returncode == 0, one.stderr
    hosts = start(command, tmp_path / "two", *mesh)
    outputs = finish(hosts)
    assert [host.returncode for host in hosts] == [0, 0], outputs
    # Host 0 alone talks. Gloo prints on both, from several threads at once: its lines come out in pieces, or empty.
    for words in ("data: ", "finished at step 4"):
        assert words in outputs[0][0]
        assert words not in outputs[1][0]
    whole, parts = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["step"] for row in parts] == [1, 2, 3, 4]
    for row, other in zip(whole, parts, strict=True):
        for key in ("loss", "loss_text", "loss_audio", "gradient_norm", "tokens", "flops_llm", "flops_vision"):
            assert other[key] == pytest.approx(row[key], rel=TOLERANCE), (row["step"], key)
    assert Workdir(tmp_path / "two", keep=3).steps() == Workdir(tmp_path / "one", keep=3).steps()


def test_what_one_host_cannot_decode_is_lost_on_both(command, tmp_path):
    """Every row lies on both. Host 1's disk has cut pictures and other ones; the run is as if all were cut for all."""
    roots = [small_copy(command.root, tmp_path / name, lines=LINES) for name in ("good", "bad", "cut")]
    pictures = sorted(path.relative_to(roots[0]) for path in roots[0].rglob("*") if path.suffix in (".png", ".jpg"))
    for number, name in enumerate(pictures[::3]):
        whole = (roots[0] / name).read_bytes()
        for root in roots[1:]:
            (root / name).unlink()  # a hard link
            (root / name).write_bytes(whole[: len(whole) // 2])
        if number % 2:
            with Image.open(roots[0] / name) as picture:
                ImageOps.invert(picture.convert("RGB")).save(roots[1] / name)
    settings = (*SPLIT_ROWS, "data.max_bad_fraction=0.5", "data.workers=1")
    one = command(tmp_path / "one", *SHARED, *settings, f"data.root={roots[2]}", devices=8)
    assert one.returncode == 0, one.stderr
    own = tuple((f"data.root={root}",) for root in roots[:2])
    hosts = start(command, tmp_path / "two", *settings, of_host=own)
    outputs = finish(hosts)
    assert [host.returncode for host in hosts] == [0, 0], outputs
    whole, parts = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for row, other in zip(whole, parts, strict=True):
        for key in ("loss", "loss_text", "loss_audio", "gradient_norm", "tokens"):
            assert other[key] == pytest.approx(row[key], rel=TOLERANCE), (row["step"], key)
    lost = parts[-1]["skipped"]
    assert lost["differs"] > 0
    assert lost["unreadable_media"] > 0
    assert lost["differs"] + lost["unreadable_media"] == whole[-1]["skipped"]["unreadable_media"]


def test_two_hosts_share_a_workdir_in_a_bucket(command, tmp_path, monkeypatch):
    """Each has a scratch folder of its own; only the first writes numbers; both go on from the same step."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with bucket_server() as server:
        for name, value in server.variables().items():
            monkeypatch.setenv(name, value)
        for last in (2, 4):
            hosts = start(command, "gs://bucket/two", *MESH, f"train.steps={last}")
            outputs = finish(hosts)
            assert [host.returncode for host in hosts] == [0, 0], outputs
            assert server.committed("two")[-1] == last
        assert "resumed from step 2" in " ".join(outputs[0][0].split())
        found = read_metrics(server.download("two", tmp_path / "copy"))
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "copy"}


def test_sigterm_to_one_host_stops_both_with_a_checkpoint(command, tmp_path):
    hosts = start(command, tmp_path / "run", *MESH, "train.steps=100000", "--stopped-code=75")
    while hosts[0].poll() is None and not read_metrics(tmp_path / "run"):
        time.sleep(0.1)
    hosts[1].send_signal(signal.SIGTERM)
    outputs = finish(hosts)
    # Both say that there is more to do, also the one that had no signal.
    assert [host.returncode for host in hosts] == [75, 75], outputs
    last = read_metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped by SIGTERM: step {last} is saved" in " ".join(outputs[0][0].split())
    assert Workdir(tmp_path / "run", keep=3).latest_step() == last


def test_hosts_of_different_configurations_are_refused(command, tmp_path):
    hosts = start(command, tmp_path / "run", *MESH, of_host=((), ("train.seed=1",)))
    outputs = finish(hosts)
    assert [host.returncode for host in hosts] == [2, 2], outputs
    for _, err in outputs:
        assert "error: the hosts disagree on train.seed: 0 on host 0, 1 on host 1" in err
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_host_ends_both(command, tmp_path):
    """Data that host 1 does not have."""
    hosts = start(command, tmp_path / "run", *MESH, of_host=((), (f"data.root={tmp_path / 'none'}",)))
    outputs = finish(hosts)
    assert [host.returncode for host in hosts] == [2, 2], outputs
    for _, err in outputs:
        assert f"error: host 1: manifest {tmp_path / 'none' / 'text.jsonl'} cannot be read" in err
    assert not (tmp_path / "run" / "run_config.json").exists()


def test_data_that_are_too_many_to_prepare_at_the_start_are_refused(sample_dir, command, tmp_path):
    """With the command to run first; a run whose data are prepared goes on whatever their size."""
    fresh = Command(small_copy(sample_dir, tmp_path / "data"), command.cache, quick=True)
    for path in (tmp_path / "data").glob("text.jsonl"):
        path.write_text(path.read_text() + "\n" * 2_000_000)
    outputs = finish(start(fresh, tmp_path / "run", *MESH, "data.max_unprepared_mb=1"))
    for _, err in outputs:
        assert "text.jsonl: 2 MB have no index yet, and a start makes it for 1 MB at most" in err
        assert "run first, on one host: baichuan-omni tokenize --config" in err
    assert not (tmp_path / "run" / "run_config.json").exists()
