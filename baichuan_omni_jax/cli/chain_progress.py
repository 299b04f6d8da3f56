"""One view of a chain of runs while it is at work: a line a stage, and when the stage and the whole will be done.

Numbers are those of each stage's `metrics.jsonl`, read as it grows. Without a terminal there is a plain line every so
often instead.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from baichuan_omni_jax.evaluation.chain_record import METRICS, MetricsFile, ability_scores, number

State = Literal["waiting", "running", "done"]
_RECENT = 100  # steps whose median time is the pace of a stage that this process has not watched
_COMPILED = 2  # records after which programs are compiled: steps before say nothing of the pace
_START = 20.0  # seconds before a stage's first step: imports, data, programs
_WATCHED = 20.0  # seconds of watching after which the clock on the wall is the better measure: it knows of evaluations
_PLAIN_EVERY = 60.0  # seconds between plain lines


class StageProgress:
    """What is known of one stage: how far it is, its pace, its newest loss and abilities.

    Args:
        name: the stage's.
        steps: those of the whole stage; 1 of what has no steps, such as building data.
        expected: seconds a step, before any is measured.
        workdir: where its `metrics.jsonl` is, or will be; None: it has none.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        name: str,
        steps: int,
        expected: float,
        workdir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.steps, self.expected, self.state = name, max(steps, 1), expected, "waiting"
        self.step, self.loss, self.abilities = 0, None, {}
        self._metrics = MetricsFile(workdir / METRICS) if workdir else None
        self._clock, self._times = clock, deque(maxlen=_RECENT)
        # Where this process began to watch: (seconds, step). Steps of earlier starts cost it no time.
        self._watched: tuple[float, int] | None = None
        self._newest, self._records = 0.0, 0

    state: State
    loss: float | None
    abilities: dict[str, tuple[str, float]]

    def poll(self) -> None:
        """Reads what the stage has written since the last call."""
        records, anew = self._metrics.read() if self._metrics else ([], False)
        if anew:
            # A start that goes on behind what was there repeats steps, and is not measured by them.
            self._times.clear()
            self._watched, self.step, self._records = None, 0, 0
        for record in records:
            self.step = max(self.step, min(record["step"], self.steps))
            if (loss := number(record.get("loss"))) is not None:
                self.loss = loss
            self.abilities |= ability_scores(record)
            took = number(record.get("step_time_s"))
            self._records += took is not None
            if took and took > 0 and self._records > _COMPILED:
                self._times.append(took)
        if records:
            self._newest = self._clock()
            if self._watched is None and self.state == "running" and self._records > _COMPILED:
                self._watched = (self._newest, self.step)

    @property
    def pace(self) -> float | None:
        """Seconds a step as measured; None before the first one."""
        if self._watched is not None:
            since, first = self._watched
            if self._newest - since >= _WATCHED and self.step > first:
                return (self._newest - since) / (self.step - first)
        return self.step_time

    @property
    def step_time(self) -> float | None:
        """Seconds of a step alone, without evaluations, saves and compiling; None before the first one."""
        return statistics.median(self._times) if self._times else None


def seconds_left(stages: Sequence[StageProgress]) -> list[float]:
    """Returns the seconds that each stage still needs.

    A stage that has been measured goes on at its pace. The others are told by what they are expected to take, times
    what the measured ones took for what was expected of them: a machine half as fast is so for all.
    """
    # By steps alone: what comes once a stage would weigh more the fewer steps the measured ones have.
    measured = [(stage.step_time, stage) for stage in stages if stage.step]
    took = sum(pace * stage.step for pace, stage in measured if pace is not None)
    planned = sum(stage.expected * stage.step for pace, stage in measured if pace is not None)
    factor = took / planned if took and planned else 1.0
    left = []
    for stage in stages:
        pace = stage.pace or stage.expected * factor
        start = _START * factor if stage.steps > 1 and not stage.step else 0.0
        left.append(0.0 if stage.state == "done" else start + (stage.steps - stage.step) * pace)
    return left


def duration(seconds: float) -> str:
    """Writes seconds as a person says them.

    >>> duration(42.4), duration(600), duration(3 * 3600 + 300)
    ('42 s', '10 min', '3 h 05 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class ChainView:
    """Shows the stages of a chain. `update` is called about once a second.

    Args:
        stages: what there is to do, in order; finished ones are marked as such.
        console: where it is shown.
        every: seconds between plain lines, where the console is no terminal.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        stages: Sequence[StageProgress],
        console: Console,
        every: float = _PLAIN_EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages, self._console, self._every, self._clock = stages, console, every, clock
        self._said = clock()
        # Drawn anew by `update` alone: no thread of its own.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "ChainView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def begin(self, stage: StageProgress) -> None:
        """Tells that a stage is at work from now on."""
        stage.poll()
        stage.state = "running"
        if self._live is None:
            number = 1 + list(self._stages).index(stage)
            self._print(f"stage {number} of {len(self._stages)}: {self._line(stage)}")
        self.update(stage)

    def update(self, stage: StageProgress) -> None:
        """Reads what the stage at work has written, and shows it."""
        stage.poll()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif self._clock() - self._said >= self._every:
            self._print(self._line(stage))

    def finish(self, stage: StageProgress) -> None:
        """Tells that a stage is done."""
        stage.poll()
        stage.state, stage.step = "done", stage.steps
        if self._live is None:
            self._print(self._line(stage))

    def note(self, text: str) -> None:
        """Prints a sentence beside the view."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print(self, line: str) -> None:
        self._said = self._clock()
        self.note(line)

    def _line(self, stage: StageProgress) -> str:
        left = seconds_left(self._stages)
        own = left[list(self._stages).index(stage)]
        if stage.state == "done":
            parts = ["done", *_numbers(stage)]
        else:
            parts = [*([f"step {stage.step}/{stage.steps}"] if stage.steps > 1 else []), *_numbers(stage)]
            if stage.steps > 1 and not stage.step:
                parts.append("compiling, and measuring the first weights")
            parts.append(f"about {duration(own)} left")
        return f"{stage.name}: {', '.join(parts)}; of all stages {duration(sum(left))}"

    def _table(self) -> Table:
        left = seconds_left(self._stages)
        table = Table(box=None, pad_edge=False, caption=f"about {duration(sum(left))} left in all")
        for column in ("stage", "", "step", "s/step", "loss", "abilities", "left"):
            table.add_column(column, justify="right" if column in ("step", "s/step", "loss", "left") else "left")
        for stage, seconds in zip(self._stages, left, strict=True):
            at_work = stage.state == "running"
            table.add_row(
                stage.name,
                stage.state,
                f"{stage.step}/{stage.steps}" if stage.steps > 1 else "",
                f"{stage.pace:.2f}" if stage.pace else "",
                f"{stage.loss:.3f}" if stage.loss is not None else "",
                ", ".join(_percent(name, *score) for name, score in list(stage.abilities.items())[:6]),
                "" if stage.state == "done" else duration(seconds),
                style="bold" if at_work else "" if stage.state == "done" else "dim",
            )
        return table


def _numbers(stage: StageProgress) -> list[str]:
    numbers = [f"{stage.pace:.2f} s a step"] if stage.pace and stage.steps > 1 else []
    numbers += [f"loss {stage.loss:.3f}"] if stage.loss is not None else []
    return numbers + [_percent(name, *score) for name, score in stage.abilities.items()]


def _percent(name: str, measure: str, score: float) -> str:
    return f"{name} {'cer ' if measure == 'cer' else ''}{100 * score:.0f} %"
