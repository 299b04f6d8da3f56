"""Runs that SIGKILL ends at random moments, four times each: they cannot be told from one that nothing ended."""

import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.faults.kills import EVERY, Kill, Moment, kill_at
from tests.helpers.faults.uninterrupted import STEPS, assert_same_run, last_step, leftovers, resumed_from
from tests.helpers.proofs import sized

pytestmark = pytest.mark.slow

SEED = 11
# Each of these runs is killed four times: while it starts, at any time of training, and twice as a save begins.
RUNS = sized(1, 5)
KINDS = ("starting", "training", "saving", "saving")
# Seconds over which kills are spread evenly: a start's first part, some steps, a save and a little more.
START_TIME, TRAINING_TIME, SAVE_TIME = 3.0, 0.4, 0.15


@dataclass(frozen=True)
class Run:
    """A run, its kills in order, what each left half-written, and its last start, which came to the end."""

    workdir: Path
    kills: list[Kill]
    leftovers: list[list[str]]
    end: subprocess.CompletedProcess


def draw_moments(rng: random.Random) -> list[Moment]:
    moments = []
    for place, kind in enumerate(rng.sample(KINDS, len(KINDS))):
        save = EVERY * (place + 1)
        if kind == "starting":
            moments.append(Moment(0, rng.uniform(0, START_TIME)))
        elif kind == "training":
            moments.append(Moment(save - rng.randrange(EVERY), rng.uniform(0, TRAINING_TIME)))
        else:
            moments.append(Moment(save, rng.uniform(0, SAVE_TIME), saving=True))
    return moments


@pytest.fixture(scope="module")
def runs(pretrain, finished, tmp_path_factory) -> dict[str, Run]:
    """`RUNS` runs killed at random, one killed in its first save, one before it saves at all; two at a time."""
    every = f"checkpoint.every={EVERY}"
    folder, rng = tmp_path_factory.mktemp("killed"), random.Random(SEED)
    plans = {str(number): (draw_moments(rng), every) for number in range(RUNS)}
    plans["first save"] = ([Moment(EVERY, 0.0, saving=True)], every)
    plans["no save"] = ([Moment(STEPS // 2, 0.0)], "checkpoint.every=100")

    def interrupt(name: str) -> Run:
        workdir, (moments, saves) = folder / name, plans[name]
        changes, kills, left = (f"train.steps={STEPS}", saves), [], []
        for moment in moments:
            start = pretrain.start(workdir, *changes)
            kills.append(kill_at(start, workdir, moment.not_before(last_step(workdir))))
            left.append(leftovers(workdir))
        return Run(workdir, kills, left, pretrain(workdir, *changes))

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(plans, pool.map(interrupt, plans), strict=True))
    for name, run in found.items():
        print(*(f"run {name} killed {kill}" for kill in run.kills), sep="\n")
    return found


@pytest.fixture(scope="module")
def at_random(runs) -> list[Run]:
    return [run for name, run in runs.items() if name.isdigit()]


def test_kills_fall_into_all_that_a_run_does(at_random):
    doing = Counter(kill.doing for run in at_random for kill in run.kills)
    print(dict(doing))
    assert doing.total() == RUNS * len(KINDS)
    assert doing["nothing"] == 0, "a kill came too late"
    assert doing["starting"] >= 1
    # A save may be over before its kill comes; the kill in the first save, below, always meets one.
    assert doing["saving"] >= sized(0, RUNS)


def test_a_kill_costs_no_checkpoint(at_random):
    """At most the steps since the last one are lost, and the save that was under way."""
    for run in at_random:
        saved = 0
        for kill in run.kills:
            assert max(kill.saved, default=0) >= saved
            saved = max(kill.saved, default=0)
            assert kill.last - saved <= 2 * EVERY, kill
        assert run.end.returncode == 0, run.end.stderr
        assert resumed_from(run.end.stdout) == saved


def test_killed_runs_end_as_the_uninterrupted_one(at_random, finished):
    """Every number of every step, and parameters, optimizer and data of the last, bit for bit."""
    for run in at_random:
        assert_same_run(run.workdir, finished)


def test_kill_in_the_first_save(runs, finished):
    """Nothing is taken for a checkpoint, what is half-written is named and goes, and the run begins again."""
    run = runs["first save"]
    ((kill,), ((unfinished,),)) = run.kills, run.leftovers
    assert (kill.doing, kill.saved) == ("saving", [])
    assert run.end.returncode == 0, run.end.stderr
    assert f"removing {run.workdir / 'checkpoints' / unfinished}, which was left unfinished" in run.end.stderr
    assert resumed_from(run.end.stdout) == 0
    assert_same_run(run.workdir, finished)


def test_kill_before_any_save(runs, finished):
    """The numbers of the steps that are lost are replaced, not repeated."""
    run = runs["no save"]
    (kill,) = run.kills
    assert (kill.doing, kill.saved) == ("training", [])
    assert kill.last >= STEPS // 2
    assert run.end.returncode == 0, run.end.stderr
    assert resumed_from(run.end.stdout) == 0
    assert_same_run(run.workdir, finished)
