"""Jobs over units: resumed, shared by processes, with failing units and dying processes, on Beam."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job, Unit, run_job
from data_pipelines.tools.commands import make_runner
from tests.helpers.proofs import HANG, wait_for

OTHER_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPOSITORY = str(Path(__file__).resolve().parents[3])


def work(unit: Unit, folder: Path) -> dict:
    """Writes what the unit says; says how often it was tried, by which process, in a file outside."""
    text, log = unit.content
    with open(log, "a") as file:
        file.write(f"{unit.name} {os.getpid()}\n")
    if text == "fail":
        raise ValueError("no good")
    if text == "die":
        os._exit(9)
    if text == "wait":
        time.sleep(60)
    (folder / f"{unit.name}.txt").write_text(text)
    return {"letters": len(text)}


def make_job(folder: Path, texts: list[str]) -> Job:
    log = str(folder / "log")
    return Job("letters", [Unit(f"unit-{i}", text, (text, log)) for i, text in enumerate(texts)], work, folder / "out")


def tried(job: Job) -> list[str]:
    """Names of the units that were begun, in order."""
    log = job.out.with_name("log")
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def contents(job: Job) -> dict[str, str]:
    return {path.name: path.read_text() for path in job.out.glob("*.txt")}


@pytest.fixture
def quiet():
    return lambda line: None


@pytest.mark.parametrize("workers", [0, 2])
def test_units_are_done_once(tmp_path, workers):
    job, lines = make_job(tmp_path, ["a", "bb", "ccc"]), []
    assert run_job(job, make_runner("local", workers), lines.append) == [{"letters": n} for n in (1, 2, 3)]
    assert contents(job) == {"unit-0.txt": "a", "unit-1.txt": "bb", "unit-2.txt": "ccc"}
    assert run_job(job, make_runner("local", workers), lines.append) == [{"letters": n} for n in (1, 2, 3)]
    assert len(tried(job)) == 3
    assert "3 of 3 shards are done already" in lines[-1]


def test_what_changed_or_went_is_done_again(tmp_path, quiet):
    run_job(make_job(tmp_path, ["a", "b", "c"]), make_runner("local", 0), quiet)
    job = make_job(tmp_path, ["a", "B", "c"])
    (job.out / "unit-2.txt").write_text("cut of")
    run_job(job, make_runner("local", 0), quiet)
    assert contents(job) == {"unit-0.txt": "a", "unit-1.txt": "B", "unit-2.txt": "c"}
    assert tried(job)[3:] == ["unit-1", "unit-2"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_unit_stops_no_other(tmp_path, workers, quiet):
    job = make_job(tmp_path, ["a", "fail", "c"])
    with pytest.raises(ConfigError, match="letters: 1 of 3 shards failed, first unit-1: ValueError: no good"):
        run_job(job, make_runner("local", workers), quiet)
    assert contents(job) == {"unit-0.txt": "a", "unit-2.txt": "c"}
    assert list((job.out / ".partial").iterdir()) == []


def test_only_the_unit_that_kills_its_process_fails(tmp_path, quiet):
    """Among many, the others are not done one by one: at most those under way when a process dies are done again."""
    job = make_job(tmp_path, ["a", "die", *"cdefghijkl"])
    with pytest.raises(ConfigError, match=r"letters: 1 of 12 shards failed, first unit-1: the process .* died"):
        run_job(job, make_runner("local", 2), quiet)
    assert len(contents(job)) == 11
    assert tried(job).count("unit-1") == 3
    assert len(tried(job)) <= 12 + 2 + 4
    assert list((job.out / ".partial").iterdir()) == []


def test_two_programs_in_one_folder(tmp_path, quiet):
    job = make_job(tmp_path, ["a"])

    def other(again: Job, units):
        with pytest.raises(ConfigError, match=r"letters: another program is at work in .*out; nothing was changed"):
            run_job(job, make_runner("local", 0), quiet)
        yield from make_runner("local", 0)(again, units)

    run_job(job, other, quiet)
    assert contents(job) == {"unit-0.txt": "a"}


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHER_SIGNALS)]
)
def test_no_process_outlives_the_program(tmp_path, signal_number):
    code = (
        "from pathlib import Path; from tests.data_pipelines.datasets import test_jobs;"
        "from data_pipelines.datasets.jobs.job import run_job;"
        "from data_pipelines.datasets.jobs.runners import LocalRunner\n"
        f"if __name__ == '__main__': run_job(test_jobs.make_job(Path({str(tmp_path)!r}), ['wait'] * 4), LocalRunner(2))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": REPOSITORY}, stderr=subprocess.DEVNULL
    )
    job = make_job(tmp_path, [])
    wait_for(lambda: len(tried(job)) == 2, "the work of two units", process)
    workers = [int(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()]
    assert all(map(alive, workers))
    process.send_signal(signal_number)
    assert process.wait(timeout=HANG) != 0
    wait_for(lambda: not any(map(alive, workers)), "the end of the workers")


def alive(process: int) -> bool:
    """A process that nobody has waited for yet is dead all the same."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_names_and_numbers_that_make_no_runner(tmp_path, quiet):
    for arguments, message in [
        (("spark", 1), "unknown runner 'spark'"),
        (("local", -1), "--workers -1 must be at least 0"),
        (("local", 1, ["--streaming"]), "--beam-args need --runner beam"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_runner(*arguments)
    twice = [Unit("same", "", ("a", "")), Unit("same", "", ("b", ""))]
    with pytest.raises(ConfigError, match="two units of work have the same name"):
        run_job(Job("letters", twice, work, tmp_path), make_runner("local", 0), quiet)


def test_beam_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'baichuan_omni_jax\[beam\]'"):
        make_runner("beam", 1)


def test_beam_does_the_same_as_processes(tmp_path, quiet, monkeypatch):
    pytest.importorskip("apache_beam", reason="needs the extra beam")
    monkeypatch.setenv("PYTHONPATH", REPOSITORY)  # its processes import `work`
    texts = ["a", "bb", "fail", "dddd"]
    for name, workers in (("local", 0), ("beam", 2)):
        job = make_job(tmp_path / name, texts)
        job.out.mkdir(parents=True)
        with pytest.raises(ConfigError, match="1 of 4 shards failed, first unit-2: ValueError: no good"):
            run_job(job, make_runner(name, workers), quiet)
        texts[2] = "ccc"
        assert len(run_job(make_job(tmp_path / name, texts), make_runner(name, workers), quiet)) == 4
        assert contents(job) == dict(zip([f"unit-{i}.txt" for i in range(4)], texts, strict=True))
        assert sorted(tried(job)) == sorted([*(f"unit-{i}" for i in range(4)), "unit-2"])
        texts[2] = "fail"
        marks = [json.loads(path.read_text()) for path in sorted((job.out / ".units").glob("*.json"))]
        assert [mark["summary"]["letters"] for mark in marks] == [1, 2, 3, 4]
