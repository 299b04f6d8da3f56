"""The order of a window's rows: every step gets rows of like cost, and any equal parts of a step like sums.

A step waits for its slowest rank. Rows sorted by cost are cut into steps, so that a step's rows differ as little as
they can; the steps then come in random order, so that long rows do not come first. Within a step rows are dealt so that
halves, quarters, ... have nearly equal sums: it does not matter how many ranks share the step, nor in how many parts it
is accumulated. Costs 9 2 5 8 1 6 in steps of 2: (9 8) (6 5) (2 1), shuffled: (6 5) (2 1) (9 8).
"""

from collections.abc import Sequence
from random import Random


def order_rows(costs: Sequence[int], rows: int, random: Random) -> list[int]:
    """Numbers of all rows in their new order, `rows` of them a step; what is left over stays the last step."""
    ranked = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    steps = [ranked[start : start + rows] for start in range(0, len(ranked), rows)]
    last = [steps.pop()] if steps and len(steps[-1]) < rows else []
    random.shuffle(steps)
    return [row for step in steps + last for row in _spread(step, costs)]


def _spread(step: list[int], costs: Sequence[int]) -> list[int]:
    """The rows of a step, costliest first, dealt so that its halves have equal counts and nearly equal sums; then the
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
