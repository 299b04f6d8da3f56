"""The view of a chain of runs: arithmetic of the time that is left, from made-up metrics; what is printed."""

from pathlib import Path

import pytest
from rich.console import Console

from baichuan_omni_jax.cli.chain_progress import ChainView, StageProgress, seconds_left
from tests.helpers.chain_folder import ability, step_record, write_lines


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stage(folder: Path, clock: Clock, name: str = "a", steps: int = 100, expected: float = 1.0) -> StageProgress:
    return StageProgress(name, steps, expected, folder / name, clock)


def grow(folder: Path, first: int, last: int, took: float = 0.5, name: str = "a") -> None:
    records = [step_record(step) | {"step_time_s": took} for step in range(first, last + 1)]
    write_lines(folder / name / "metrics.jsonl", records, "a")


def test_what_is_expected_counts_until_something_is_measured(tmp_path, clock):
    stages = [stage(tmp_path, clock, "a", 100, 1.0), stage(tmp_path, clock, "b", 50, 2.0)]
    start = seconds_left([stage(tmp_path, clock, "c", 2, 0.0)])[0]
    assert seconds_left(stages) == [start + 100, start + 100]


def test_a_slow_machine_is_slow_in_the_stages_to_come(tmp_path, clock):
    first, second = stage(tmp_path, clock, "a", 100, 1.0), stage(tmp_path, clock, "b", 50, 2.0)
    grow(tmp_path, 1, 40, took=3.0)
    first.poll()
    left = seconds_left([first, second])
    assert left[0] == pytest.approx(60 * 3)
    # Three times what was expected, its start too.
    assert left[1] == pytest.approx(3 * seconds_left([second])[0])
    first.state = "done"
    assert seconds_left([first, second])[0] == 0


def test_evaluations_between_steps_count_once_the_clock_is_trusted(tmp_path, clock):
    watched = stage(tmp_path, clock)
    watched.state = "running"
    # The first steps compile: they say nothing.
    grow(tmp_path, 1, 2, took=30.0)
    watched.poll()
    assert watched.pace is None
    clock.now = 60.0
    grow(tmp_path, 3, 3)
    watched.poll()
    assert watched.pace == 0.5
    # Ten steps of half a second, and an evaluation of 35.
    clock.now = 100.0
    grow(tmp_path, 4, 13)
    watched.poll()
    assert watched.pace == pytest.approx(4.0)
    assert seconds_left([watched]) == [pytest.approx(87 * 4.0)]


def test_steps_of_earlier_starts_cost_this_one_no_time(tmp_path, clock):
    grow(tmp_path, 1, 60)
    resumed = stage(tmp_path, clock)
    resumed.poll()
    assert resumed.step == 60
    resumed.state = "running"
    # The run starts again from its checkpoint of step 50: the file is another one.
    clock.now = 100.0
    other = tmp_path / "other"
    write_lines(other, [step_record(step) for step in range(1, 51)])
    other.replace(tmp_path / "a" / "metrics.jsonl")
    resumed.poll()
    assert resumed.step == 50
    clock.now = 130.0
    grow(tmp_path, 51, 60)
    resumed.poll()
    assert resumed.pace == pytest.approx(3.0)
    assert seconds_left([resumed]) == [pytest.approx(120.0)]


def test_odd_lines_are_passed_over(tmp_path, clock):
    odd = stage(tmp_path, clock)
    grow(tmp_path, 1, 4)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": null, "step_time_s": "long"}\nnothing\n{"step": 900, "step_time_s": -1}\n{"st')
    odd.poll()
    # A run that was made shorter ends where it is told to.
    assert odd.step == 100
    assert odd.loss == pytest.approx(step_record(4)["loss"])
    assert odd.pace == 0.5


def test_plain_lines_without_a_terminal(tmp_path, clock, capsys):
    first, second = stage(tmp_path, clock, "a", 10), stage(tmp_path, clock, "b", 10)
    with ChainView([first, second], Console(force_terminal=False, width=200), every=60.0, clock=clock) as view:
        view.begin(first)
        steps = [*map(step_record, (2, 3)), step_record(4, **ability("digit", 0.5))]
        write_lines(tmp_path / "a" / "metrics.jsonl", steps)
        clock.now = 30.0
        view.update(first)
        clock.now = 61.0
        view.update(first)
        view.note("a [sentence] beside it")
        view.finish(first)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stage 1 of 2: a: step 0/10, compiling, and measuring the first weights, about")
    assert lines[1].startswith("a: step 4/10, 0.50 s a step, loss 3.619, digit 50 %, about 3 s left; of all stages")
    assert lines[2] == "a [sentence] beside it"
    assert lines[3].startswith("a: done, ")
    assert len(lines) == 4


def test_a_terminal_has_a_line_a_stage(tmp_path, clock):
    stages = [stage(tmp_path, clock, name) for name in ("first", "second")]
    console = Console(force_terminal=True, width=120, record=True)
    with ChainView(stages, console, clock=clock) as view:
        write_lines(tmp_path / "first" / "metrics.jsonl", [step_record(4, **ability("digit", 0.5))])
        view.begin(stages[0])
    shown = console.export_text()
    assert "first" in shown
    assert "4/100" in shown
    assert "digit 50 %" in shown
    assert "left in all" in shown
