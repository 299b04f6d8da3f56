"""Builds that SIGKILL ends at random moments end with the same bytes; damaged shards are reported, never trusted."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from data_pipelines.datasets.jobs.job import read_mark
from data_pipelines.datasets.shards import ShardedDataset, open_dataset
from data_pipelines.documents.document import Document
from data_pipelines.errors import SampleError
from data_pipelines.tools.commands import make_runner
from data_pipelines.tools.validate import validate
from tests.helpers.proofs import HANG, sized, wait_for

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = 5
# Builds, and how often each is killed.
BUILDS, KILLS = sized(1, 4), sized(3, 4)
SHARD_DOCUMENTS = 20
SHARDS = 40  # of the sample data set, at least
DAMAGES = sized(30, 200)
SOURCES = ("audio", "image", "omni", "text", "video")


def start(root: Path, out: Path) -> subprocess.Popen:
    """A build of the sample data set in some forty shards, in a group of processes of its own."""
    manifests = [str(root / f"{name}.jsonl") for name in SOURCES]
    command = [sys.executable, "-m", "data_pipelines.datasets.builder.build", *manifests, "--out", str(out)]
    command += ["--shard-documents", str(SHARD_DOCUMENTS), "--workers", "2"]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(root: Path, out: Path) -> str:
    """Builds to the end; returns what was printed."""
    process = start(root, out)
    printed, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    return printed


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset, bookkeeping left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".units" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(sample_dir, tmp_path_factory) -> Path:
    """A dataset built in one go."""
    out = tmp_path_factory.mktemp("whole") / "dataset"
    finish(sample_dir, out)
    documents = [len((sample_dir / f"{name}.jsonl").read_text().splitlines()) for name in SOURCES]
    assert count_marks(out) == sum(-(-count // SHARD_DOCUMENTS) for count in documents) >= SHARDS
    return out


def workers_of(process: int) -> list[int]:
    """The processes that it started, and those that they started."""
    children = Path(f"/proc/{process}/task/{process}/children")
    try:
        found = [int(number) for number in children.read_text().split()]
    except OSError:
        return []
    return [*found, *(number for child in found for number in workers_of(child))]


def command_line(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_shards(process: subprocess.Popen, out: Path, shards: int, delay: float) -> list[int]:
    """Waits until so many shards are done, then `delay` seconds; returns the processes that work for it then."""
    while len(list((out / ".units").glob("*.json"))) < shards and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    return workers_of(process.pid)


def kill(process: subprocess.Popen, family: list[int]) -> str:
    """Kills the program; returns what it was doing."""
    if process.poll() is not None:
        return "nothing"
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, family)), "the end of the workers")
    return "building" if family else "starting"


def count_marks(out: Path) -> int:
    """How many shards are marked as done; each has its files, whole."""
    marks = [mark for path in (out / ".units").glob("*.json") if (mark := read_mark(path))]
    for mark in marks:
        for name, (size, _) in mark["files"].items():
            assert (out / name).stat().st_size == size
    return len(marks)


def test_killed_builds_end_as_the_uninterrupted_one(sample_dir, whole, tmp_path):
    """Each is killed four times after some more shards, or while it starts or plans."""
    rng, doing, expected = random.Random(SEED), Counter(), tree(whole)
    for number in range(BUILDS):
        folder, progress = tmp_path / str(number), 0
        for _ in range(KILLS):
            process = start(sample_dir, folder)
            more = rng.randrange(SHARDS // KILLS)
            family = await_shards(process, folder, progress + more, rng.uniform(0, 0.1 if more else 2.0))
            doing[kill(process, family)] += 1
            process.communicate()
            found = count_marks(folder)
            assert found >= progress, "a shard that was done is not done any more"
            progress = found
        printed = finish(sample_dir, folder)
        assert progress == 0 or "are done already" in printed
        assert tree(folder) == expected
    print(dict(doing))
    assert doing.total() == BUILDS * KILLS
    assert doing["building"] >= BUILDS * KILLS / 2


def test_a_killed_worker_costs_nothing(sample_dir, whole, tmp_path):
    """Its shards are done by another one in the same run."""
    rng = random.Random(SEED)
    for number in range(sized(1, 2)):
        process = start(sample_dir, tmp_path / str(number))
        family = await_shards(process, tmp_path / str(number), rng.randrange(1, SHARDS - 10), 0.0)
        assert process.poll() is None
        os.kill(rng.choice([one for one in family if b"spawn_main" in command_line(one)]), signal.SIGKILL)
        _, errors = process.communicate(timeout=HANG)
        assert process.returncode == 0, errors
        assert tree(tmp_path / str(number)) == tree(whole)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_goes_on(sample_dir, whole, tmp_path, stop):
    """SIGINT as a terminal sends it, to the whole group."""
    process = start(sample_dir, tmp_path / "out")
    family = await_shards(process, tmp_path / "out", SHARDS // 4, 0.0)
    assert process.poll() is None
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.terminate()
    process.communicate(timeout=HANG)
    assert process.returncode != 0
    wait_for(lambda: not any(map(alive, family)), "the end of the workers")
    finish(sample_dir, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(whole)


def contents(dataset: ShardedDataset, shard: int) -> list:
    return [
        one if isinstance(one, SampleError) else (one.id, one.text, media(one)) for one in dataset.documents_of(shard)
    ]


def media(document: Document) -> dict[str, bytes]:
    return {name: one.data for name, one in document.media.items()}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, a bit flipped, or a stretch overwritten."""
    place = rng.randrange(len(content))
    kind = rng.choice(("cut", "flip", "stretch"))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    return content[:place] + rng.randbytes(min(rng.randrange(1, 5000), len(content) - place)) + content[place + 5000 :]


def test_damaged_shards_are_reported_and_never_trusted(whole, tmp_path):
    """Each document of a damaged shard is either the one that was written, or reported as `bad_record`."""
    folder = shutil.copytree(whole, tmp_path / "dataset")
    rng, dataset, reported = random.Random(SEED), open_dataset(folder), 0
    for _ in range(DAMAGES):
        number = rng.randrange(len(dataset.shards))
        path = folder / dataset.shards[number].file
        content = path.read_bytes()
        expected = contents(open_dataset(folder), number)
        path.write_bytes(damage(content, rng))
        found = contents(open_dataset(folder), number)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            if isinstance(one, SampleError):
                assert one.cause == "bad_record"
                assert path.name in str(one)
            else:
                assert one == other
        reported += any(isinstance(one, SampleError) for one in found)
        path.write_bytes(content)
    print(f"{reported} of {DAMAGES} damages cost a document; the others fell between records")
    assert reported >= DAMAGES / 2


def test_validate_finds_every_damaged_shard(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "dataset")
    rng, dataset = random.Random(SEED), open_dataset(folder)
    chosen = sorted(shard.file for shard in rng.sample(dataset.shards, 8))
    for file in chosen:
        content = (folder / file).read_bytes()
        while (changed := damage(content, rng)) == content:
            pass
        (folder / file).write_bytes(changed)
    problems = validate(open_dataset(folder), make_runner("local", 2))
    assert sorted({one.where for one in problems if one.cause == "bad_checksum"}) == chosen
    assert {one.where.split()[0] for one in problems} == set(chosen)
    assert {one.cause for one in problems} <= {"bad_checksum", "bad_record"}
    description = json.loads((folder / "dataset.json").read_text())
    assert len(description["shards"]) == len(dataset.shards) == count_marks(whole)
