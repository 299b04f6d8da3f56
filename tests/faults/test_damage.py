"""Checkpoints that were damaged after they were written, and the command that finds them."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.faults.uninterrupted import EVERY, STEPS, assert_same_run, committed, resumed_from
from tests.helpers.micro import contents
from tests.helpers.proofs import sized

pytestmark = pytest.mark.slow

NEWEST, BEFORE, OLDEST = STEPS, STEPS - EVERY, STEPS - 2 * EVERY


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage(workdir: Path, step: int, what: str, how) -> Path:
    """Damages a file of a step, in a folder the largest, and returns it."""
    path = workdir / "checkpoints" / str(step) / what
    if path.is_dir():
        path = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    how(path)
    return path


@pytest.fixture
def workdir(finished, tmp_path) -> Path:
    copy = shutil.copytree(finished, tmp_path / "run")
    assert committed(copy) == [OLDEST, BEFORE, NEWEST]
    return copy


@pytest.mark.parametrize(
    "damages",
    [
        [("params/audio_head", truncate), ("opt_state", flip)],
        [("data.json", flip), ("checksums.json", flip)],
        *sized([], [[("params/llm", flip)], [("checksums.json", truncate), ("data.json", truncate)]]),
    ],
    ids=lambda damages: ", ".join(f"{what} {how.__name__}" for what, how in damages),
)
def test_damaged_steps_are_named_and_the_one_before_is_used(damages, workdir, finished, pretrain):
    """`damages` are of the newest step and the one before: the run does their steps again."""
    steps = list(zip((NEWEST, BEFORE), damages, strict=False))
    bad = {step: damage(workdir, step, *one) for step, one in steps}
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    for step, path in bad.items():
        lines = [line for line in done.stderr.splitlines() if f"step {step} is damaged and passed over" in line]
        assert len(lines) == 1, done.stderr
        # A changed list of checksums names a file that it has wrong.
        assert str(path if path.name != "checksums.json" else path.parent) in lines[0]
    assert resumed_from(done.stdout) == NEWEST - EVERY * len(bad)
    assert_same_run(workdir, finished)


def test_step_without_checksums_counts_as_unfinished(workdir, finished, pretrain):
    path = damage(workdir, NEWEST, "checksums.json", Path.unlink).parent
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 0, done.stderr
    assert f"removing {path}, which was left unfinished" in done.stderr
    assert resumed_from(done.stdout) == BEFORE
    assert_same_run(workdir, finished)


def test_when_every_step_is_damaged_the_run_says_so_and_changes_nothing(workdir, pretrain):
    bad = [
        damage(workdir, NEWEST, "opt_state", truncate),
        damage(workdir, BEFORE, "data.json", Path.unlink),
        damage(workdir, OLDEST, "params/llm", flip),
    ]
    before = contents(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_bytes()
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 2
    *warnings, error = done.stderr.strip().splitlines()
    for path in bad:
        assert any(f"{path} is missing or changed" in line for line in warnings), done.stderr
    there = workdir / "checkpoints"
    assert error == f"error: {there} holds no usable checkpoint: {bad[0]} is missing or changed"
    assert (contents(there), (workdir / "metrics.jsonl").read_bytes()) == before
