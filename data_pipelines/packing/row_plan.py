"""The row plan: documents of the mixture packed into rows, rows ordered into steps. Lengths alone, nothing decoded.

Its state is one small JSON object that holds for all hosts: where each source is, the keys of the documents that wait
in the pool and in open rows, and how many steps of the window in hand were given. A window's steps are planned together
and planned again when a state inside it is restored; what came before it never is.

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

from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.mixture import Mixture
from data_pipelines.packing.packer import Packer
from data_pipelines.packing.row_limits import DocumentKey, DocumentLengths

PackedRow = list[DocumentKey]
Cost = Callable[[list[DocumentLengths]], int]
FORMAT = 2  # of states: raise it when they mean something else than before


class RowPlan:
    """An iterator over rows, as lists of items, in the order in which they are packed."""

    def __init__(self, mixture: Mixture, packer: Packer):
        self._mixture, self._packer = mixture, packer

    def __iter__(self) -> Iterator[list[DocumentLengths]]:
        return self

    def __next__(self) -> list[DocumentLengths]:
        """Returns the next row. A finite mixture ends with the rows that are still open."""
        while (document := self._mixture.next()) is not None:
            row = self._packer.add(document)
            if row is not None:
                return row
        row = self._packer.finish()
        if row is None:
            raise StopIteration
        return row

    @property
    def state(self) -> dict:
        return {"sources": self._mixture.state, "rows": self._packer.state}

    def restore(self, state: dict) -> None:
        """Goes on exactly where `state` was taken; reads the lengths of the documents it names."""
        self._mixture.restore(state["sources"])
        find = lambda keys: [self._mixture.document((source, number)) for source, number in keys]  # noqa: E731
        packed = state["rows"]
        self._packer.restore(packed, find(packed["pool"]), [find(row) for row in packed["open"]])


class StepPlan:
    """An iterator over steps of rows of document keys, the rows of a window of steps ordered together by cost.

    A finite mixture's last step may have fewer rows, and its last window fewer steps.

    Args:
        plan: the rows.
        rows: how many make a step.
        window: how many steps are ordered together.
        cost: what a row costs (`flops.row_cost`); None: rows stay in their order.
        seed: decides the order of steps in a window.
    """

    def __init__(self, plan: RowPlan, rows: int, window: int = 1, cost: Cost | None = None, seed: int = 0):
        self._plan, self._rows, self._cost, self._seed = plan, rows, cost, seed
        self._window = max(window, 1) if cost else 1
        self._number = self._given = 0  # windows begun and ended; steps given of the one in hand
        self._before = plan.state
        self._steps: list[list[PackedRow]] = []

    def __iter__(self) -> Iterator[list[PackedRow]]:
        return self

    def __next__(self) -> list[PackedRow]:
        self._fill_window()
        step = self._steps[self._given]
        self._given += 1
        if self._given == len(self._steps):
            self._number, self._given, self._steps, self._before = self._number + 1, 0, [], self._plan.state
        return step

    @property
    def state(self) -> dict:
        """JSON-ready: the row plan's state before the window in hand, the window's number, and its steps given."""
        return {"format": FORMAT, "window": self._number, "given": self._given, **self._before}

    def restore(self, state: dict) -> None:
        """Goes on exactly where `state` was taken. Raises ConfigError when it is of other data or another version."""
        check_format(state)
        self._plan.restore(state)
        self._number, self._given, self._steps = state["window"], state["given"], []
        self._before = self._plan.state

    def _fill_window(self) -> None:
        if self._steps:
            return
        # A window is planned whole before its first step, as its rows are ordered together.
        rows = list(islice(self._plan, self._window * self._rows))
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
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError("the data's state (data.json) was written by another version and cannot be gone on from")


def check_plan(config: DataConfig) -> None:
    """Raises ConfigError naming a number of the row plan that cannot be."""
    for name, least in (("rows", 1), ("open_bins", 1), ("look_ahead", 0), ("order_window", 0)):
        if getattr(config, name) < least:
            raise ConfigError(f"data.{name} {getattr(config, name)} must be at least {least}")
    for name, size in vars(config.budgets).items():
        if size < (name == "tokens"):
            raise ConfigError(f"data.budgets.{name} {size} must be at least {int(name == 'tokens')}")


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
