"""Which rows make a step, and in which order: what a run that stops takes up again, with as many rows as it then has.

The state is one small JSON object that holds for all hosts: that of the row plan before the window in hand, and how
many steps of the window were given. A window's steps are planned together and planned again when a state inside it is
restored; what came before it never is.

A state may be gone on from with other rows a step (more machines, or fewer). Rows that were planned for the rest of the
window in hand are then left over: they make the first steps of the new size, so that each document of theirs is
trained on once. Until they are given, the state names their documents.

    rows 4, windows of 2 steps:  [a b c d] [e f g h]    stopped after the first step
    gone on with rows 2:         [e f] [g h]  [i j] ...

Order of a window's rows. A step waits for its slowest rank. Rows sorted by cost are cut into steps, so that a step's
rows differ as little as they can; the steps then come in random order, so that long rows do not come first. Within a
step rows are dealt so that halves, quarters, ... have nearly equal sums: it does not matter how many ranks share the
step, nor in how many parts it is accumulated. Costs 9 2 5 8 1 6 in steps of 2: (9 8) (6 5) (2 1), shuffled: (6 5) (2 1)
(9 8).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random
from typing import Any

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.packer import RowPlan
from data_pipelines.packing.row_limits import DocumentKey, DocumentLengths

PackedRow = list[DocumentKey]
Cost = Callable[[list[DocumentLengths]], int]
FORMAT = 3  # of states: raise it when they mean something else than before
_READ = (2, FORMAT)  # 2 had neither `rows` nor `left`: it was gone on from with the same rows


class StepPlan:
    """An iterator over steps of rows of document keys, the rows of a window of steps ordered together by cost.

    A finite mixture's last step may have fewer rows, and its last window fewer steps.

    Args:
        plan: the rows.
        rows: how many make a step.
        window: how many steps are ordered together.
        cost: what a row costs (`flops.terms.row_cost`); None: rows stay in their order.
        seed: decides the order of steps in a window.
    """

    def __init__(self, plan: RowPlan, rows: int, window: int = 1, cost: Cost | None = None, seed: int = 0):
        self._plan, self._rows, self._cost, self._seed = plan, rows, cost, seed
        self._window = max(window, 1) if cost else 1
        self._number = self._given = 0  # windows begun and ended; steps given of the one in hand
        self._before = plan.state
        self._steps: list[list[PackedRow]] = []
        self._left: list[list[DocumentLengths]] = []  # rows planned before the window, for steps of another size

    def __iter__(self) -> Iterator[list[PackedRow]]:
        return self

    def __next__(self) -> list[PackedRow]:
        self._fill_window()
        step = self._steps[self._given]
        self._given += 1
        if self._given == len(self._steps):
            self._left = self._left[self._window * self._rows :]
            self._number, self._given, self._steps, self._before = self._number + 1, 0, [], self._plan.state
        return step

    @property
    def state(self) -> dict:
        """JSON-ready: the row plan's state before the window in hand, the window's number, and its steps given.

        `rows` is how many a step has; `left`, where there are any, the documents of rows planned before the window.
        """
        left = {"left": [[list(document.key) for document in row] for row in self._left]} if self._left else {}
        return {
            "format": FORMAT,
            "window": self._number,
            "given": self._given,
            "rows_a_step": self._rows,
            **left,
            **self._before,
        }

    def restore(self, state: dict) -> None:
        """Goes on exactly where `state` was taken, whatever rows a step had. Raises ConfigError when it is of other
        data or another version.
        """
        check_format(state)
        self._plan.restore(state)
        self._number, self._given, self._steps = state["window"], state["given"], []
        self._left = [self._plan.documents(row) for row in state.get("left", [])]
        self._before = self._plan.state
        rows = state.get("rows_a_step", self._rows)
        if self._given and rows != self._rows:
            self._leave_window(rows)

    def _leave_window(self, rows: int) -> None:
        """Ends the window in hand, whose steps have `rows` rows: what was not given is left over."""
        own, self._rows = self._rows, rows
        self._fill_window()
        rest = [self._plan.documents(row) for step in self._steps[self._given :] for row in step]
        self._left = rest + self._left[self._window * rows :]
        self._rows, self._number, self._given, self._steps = own, self._number + 1, 0, []
        self._before = self._plan.state

    def _fill_window(self) -> None:
        if self._steps:
            return
        # A window is planned whole before its first step, as its rows are ordered together.
        size = self._window * self._rows
        rows = self._left[:size]
        rows += islice(self._plan, size - len(rows))
        if not rows:
            raise StopIteration
        if self._cost is not None and self._window > 1:
            costs = [self._cost(row) for row in rows]
            rows = [rows[place] for place in order_rows(costs, self._rows, Random(f"{self._seed} {self._number}"))]
        # Keys alone from here on: lengths are looked up again by whoever decodes the row.
        keys = [[document.key for document in row] for row in rows]
        self._steps = [keys[start : start + self._rows] for start in range(0, len(keys), self._rows)]


def check_format(state: Any) -> None:
    """Raises ConfigError when `state` is not one that this version writes."""
    if not isinstance(state, dict) or state.get("format") not in _READ:
        raise ConfigError("the data's state (data.json) was written by another version and cannot be gone on from")


def order_rows(costs: Sequence[int], rows: int, random: Random) -> list[int]:
    """Orders all rows, `rows` of them a step; what is left over stays the last step."""
    ranked = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    steps = [ranked[start : start + rows] for start in range(0, len(ranked), rows)]
    last = [steps.pop()] if steps and len(steps[-1]) < rows else []
    random.shuffle(steps)
    return [row for step in steps + last for row in _spread(step, costs)]


def _spread(step: list[int], costs: Sequence[int]) -> list[int]:
    """Deals the rows of a step, costliest first, so that its halves have equal counts and nearly equal sums; then the
    halves alike. An odd count stays as it is.
    """
    if len(step) < 3 or len(step) % 2:
        return step
    halves: tuple[list[int], list[int]] = ([], [])
    sums = [0, 0]
    for one, other in zip(step[::2], step[1::2], strict=True):
        first = int(sums[0] > sums[1])  # the costlier of two goes where there is less
        for half, row in ((first, one), (1 - first, other)):
            halves[half].append(row)
            sums[half] += costs[row]
    return _spread(halves[0], costs) + _spread(halves[1], costs)
