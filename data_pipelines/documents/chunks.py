"""Chunks: stretches of a document that rows can hold, of which nothing is lost and nothing comes twice.

A document is seen as items: each token of its text, end of text included, and each medium, a video listed frame by
frame being one. A chunk is a span of items, so no medium is ever cut. Its tokens and targets are those of the whole
document in these places, and its last position has the first token of the next chunk for its target: all chunks
together train on what the whole document would, each target once. Positions begin at 0 in each.

Rows of 10 tokens, a picture of 4 with its two marks, text of 3 before it, of 6 after it:

    items       t t t P t t t t t t      the picture and its text are 12 tokens: too many with what stands before it
    chunks      t t t | P t t t t | t t
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipelines.documents.document import Lengths
from data_pipelines.documents.prompts import Element, ImageElement
from data_pipelines.packing.row_limits import RowLimits, budget_lengths

Span = tuple[int, int]
NOTHING = Lengths(tokens=0)


@dataclass(frozen=True)
class Ids:
    """Text as the ids of its tokens: so many items."""

    ids: Sequence[int]
    trainable: bool = False

    def __len__(self) -> int:
        return len(self.ids)


Run = Ids | tuple[Element, ...]  # tokens, or the elements of one medium


def group_media(elements: Sequence[Element | Ids]) -> list[Run]:
    """Ids as they are, each medium by itself, neighboring frames together unless they are of two listed videos."""
    runs: list[Run] = []
    for element in elements:
        if isinstance(element, Ids):
            runs += [element] if len(element) else []
        elif runs and _are_of_one_video(runs[-1], element):
            runs[-1] = (*runs[-1], element)
        else:
            runs.append((element,))
    return runs


def cut_span(runs: Sequence[Run], span: Span) -> tuple[list[Element | Ids], Element | Ids | None]:
    """The elements of a span of items, and the one after it (None at the document's end)."""
    found: list[Element | Ids] = []
    for (start, stop), run in _places(runs):
        if start >= span[1]:
            return found, run if isinstance(run, Ids) else run[0]
        first, last = max(span[0] - start, 0), min(span[1], stop) - start
        if isinstance(run, Ids):
            found += [Ids(run.ids[first:last], run.trainable)] if first < last else []
            if stop > span[1]:
                return found, Ids(run.ids[last:], run.trainable)
        elif first < last:
            found += run
    return found, None


def cut_chunks(runs: Sequence[Run], sizes: Sequence[Lengths], limits: RowLimits) -> tuple[list[Span], list[Span]]:
    """Spans that an empty row holds, and those of media that none does, each with (some of) the text after it.

    `sizes` are what each run takes by itself. A chunk is as long as a row, but is cut before its last medium rather
    than in that one's text, unless it begins with it.
    """
    planner = _Planner(limits)
    beyond, skip = [], 0
    for number, ((start, stop), run, size) in enumerate(
        (*placed, size) for placed, size in zip(_places(runs), sizes, strict=True)
    ):
        if isinstance(run, Ids):
            planner.add_text(start + skip, stop)
            skip = 0
        elif planner.is_beyond(size):
            # What the medium is followed by goes with it: half a row at most, so that fewer frames may make it fit.
            after = runs[number + 1] if number + 1 < len(runs) else ()
            skip = min(len(after), limits.budgets.tokens // 2) if isinstance(after, Ids) else 0
            planner.close(start)
            planner.begin(stop + skip)
            beyond.append((start, stop + skip))
        else:
            planner.add_medium(start, size)
    planner.close(planner.end)
    return planner.chunks, beyond


class _Planner:
    """Collects items into chunks from left to right. `end` is the place after the items so far."""

    def __init__(self, limits: RowLimits):
        self._limits, self._tokens = limits, limits.budgets.tokens
        self.chunks: list[Span] = []
        self.begin(0)

    def begin(self, place: int, size: Lengths = NOTHING, items: int = 0) -> None:
        """A new chunk at `place`, which has `items` items of `size` already."""
        self._start, self.end, self._size = place, place + items, size
        self._boundary: int | None = None  # where the last media begin that have text before them in the chunk
        self._since = NOTHING  # what has come since, those media included
        self._in_text = False

    def close(self, place: int) -> None:
        """Ends the chunk at `place`; one without an item is none."""
        if place > self._start:
            self.chunks.append((self._start, place))

    def is_beyond(self, size: Lengths) -> bool:
        return bool(self._limits.why_exceeds(budget_lengths(size), size.image_patches))

    def add_medium(self, place: int, size: Lengths) -> None:
        """One medium, which an empty row holds."""
        if self.is_beyond(_sum(self._size, size)):
            self.close(place)
            self.begin(place, size, 1)
            return
        if self._in_text:
            self._boundary, self._since, self._in_text = place, NOTHING, False
        self._size, self._since, self.end = _sum(self._size, size), _sum(self._since, size), place + 1

    def add_text(self, start: int, stop: int) -> None:
        """The tokens from `start` until `stop`."""
        while self._size.tokens + stop - start > self._tokens:
            if self._boundary is not None:
                place, since = self._boundary, self._since
                self.close(place)
                self.begin(place, since, start - place)
                continue
            start += self._tokens - self._size.tokens
            self.close(start)
            self.begin(start)
        text = Lengths(tokens=stop - start)
        self._in_text = self._in_text or stop > start
        self._size, self._since, self.end = _sum(self._size, text), _sum(self._since, text), stop


def _places(runs: Sequence[Run]) -> Iterator[tuple[Span, Run]]:
    place = 0
    for run in runs:
        size = len(run) if isinstance(run, Ids) else 1
        yield (place, place + size), run
        place += size


def _are_of_one_video(run: Run, element: Element) -> bool:
    together = not isinstance(run, Ids) and _is_frame(run[-1]) and _is_frame(element)
    return together and run[-1].video == element.video


def _is_frame(element: Element) -> bool:
    return isinstance(element, ImageElement) and element.frame


def _sum(one: Lengths, other: Lengths) -> Lengths:
    return Lengths(**{name: value + getattr(other, name) for name, value in vars(one).items()})
