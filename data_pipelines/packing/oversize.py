"""What is made of documents beyond a budget: the policies of `data.oversize`, in order, on what is still too long.

`split`: consecutive turns together as long as they fit, each piece with the system prompt, its media and its loss; what
a turn refers to in an earlier piece is no longer seen. Pieces without anything to learn are left out.
`fewer_frames`: as many frames of each video as fit, at least one, evenly spread.
`chunk`: stretches that fit, one after the other, which together train on each target of the document once.
`chunk_text`: the same of documents of text alone.
What no policy makes fit is skipped. The outcome is kept beside the index, so that documents are measured once.

A chunk is a span of items (`sequence`), so no medium is ever cut. Its tokens and targets are those of the whole
document in these places, and its last position has the first token of the next chunk for its target: all chunks
together train on what the whole document would, each target once. Positions begin at 0 in each. Rows of 10 tokens, an
image of 4 with its two marks, text of 3 before it, of 6 after it:

    items       t t t I t t t t t t      the image and its text are 12 tokens: too many with what stands before it
    chunks      t t t | I t t t t | t t
"""

import hashlib
import logging
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from baichuan_omni_jax.config import DataConfig
from baichuan_omni_jax.config.run import OversizePolicy
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job, Unit, run_job
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.documents.document import Document, Lengths
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.sequence import Ids, Run, Span, cut_turns, document_elements, has_frames, place_runs
from data_pipelines.errors import SampleError
from data_pipelines.packing.columns import NAMES, NO_PIECES, WHOLE, Columns, Pieces, make_columns, write_columns
from data_pipelines.packing.index import Index
from data_pipelines.packing.row_limits import RowLimits, budget_lengths

POLICIES = typing.get_args(OversizePolicy)
FORMAT = 5  # of what is kept: raise it when the policies give something else than before
_UNIT = 4096  # documents
log = logging.getLogger(__name__)
_NOTHING = Lengths(tokens=0)
_MARKS = 2  # around a medium


@dataclass(frozen=True)
class _Part:
    """Some turns of a document (`WHOLE`: all), its videos of at most `max_frames` frames (0: as they are), and of that
    a span of items (`WHOLE`: all).
    """

    turns: tuple[int, int] = WHOLE
    max_frames: int = 0
    span: tuple[int, int] = WHOLE

    def cut_from(self, document: Document) -> Document:
        turns, span = (None if pair == WHOLE else pair for pair in (self.turns, self.span))
        return replace(document, turns=turns, max_frames=self.max_frames, span=span)


@dataclass
class Fitted:
    """What fits of a document, in its order; why something does not (""); the policies that something came of."""

    parts: list[tuple[_Part, Lengths]]
    left: str
    policies: list[str]


class Fitter:
    """Applies policies to one document at a time."""

    def __init__(self, policies: Sequence[str], processor: Processor, limits: RowLimits):
        self._policies, self._processor, self._limits = policies, processor, limits

    def fit(self, document: Document) -> Fitted:
        """Raises SampleError when the document is no longer what was indexed."""
        parts, left, policies = [], [_Part()], []
        for policy in self._policies:
            tried, left = left, []
            for part in tried:
                made, still = getattr(self, f"_{policy}")(document, part)
                parts += made
                left += still
                policies += [policy] if made and policy not in policies else []
        # In the order of the document, whatever policy made them.
        parts.sort(key=lambda made: (made[0].turns, made[0].span))
        return Fitted(parts, self._why(document, left[0]) if left else "", policies)

    def _split(self, document: Document, part: _Part) -> tuple[list, list]:
        count = len(cut_turns(document_elements(document))[1])
        if part.turns != WHOLE or part.span != WHOLE or count < 2:
            return [], [part]
        # Greedy: as many turns as fit, then the next piece from there on.
        made, left, start = [], [], 0
        while start < count:
            stop, best = start + 1, None
            while stop <= count:
                piece = replace(part, turns=(start, stop))
                lengths = self._measure(document, piece)
                if lengths is not None and self._why_too_long(lengths):
                    break
                best, stop = (piece, lengths) if lengths is not None else best, stop + 1
            if best:
                made.append(best)
                start = best[0].turns[1]
            # No piece from here on has anything to learn: the document is done.
            elif stop > count:
                break  # nothing to learn in what is left
            else:
                alone = replace(part, turns=(start, start + 1))
                left += [alone] * (self._measure(document, alone) is not None)
                start += 1
        return made, left

    def _chunk(self, document: Document, part: _Part) -> tuple[list, list]:
        if part.span != WHOLE:
            return [], [part]
        whole = part.cut_from(document)
        # Runs are measured once each; sums of their lengths decide where to cut.
        runs = self._processor.runs(whole)
        sizes = [self._processor.measure_run(run, whole) for run in runs]
        spans, too_long = cut_chunks(runs, sizes, self._limits)
        measured = [(replace(part, span=span), self._measure(document, replace(part, span=span))) for span in spans]
        left = [replace(part, span=span) for span in too_long]
        made = [(chunk, lengths) for chunk, lengths in measured if lengths is not None]
        return made, [chunk for chunk in left if self._measure(document, chunk) is not None]

    def _chunk_text(self, document: Document, part: _Part) -> tuple[list, list]:
        alone = all(isinstance(run, Ids) for run in self._processor.runs(part.cut_from(document)))
        return self._chunk(document, part) if alone else ([], [part])

    def _measure(self, document: Document, part: _Part) -> Lengths | None:
        """Measures what a part takes of the budgets; None where it has nothing to learn."""
        try:
            return self._processor.measure(part.cut_from(document))
        except SampleError as error:
            if error.cause != "no_loss":
                raise
            return None

    def _fewer_frames(self, document: Document, part: _Part) -> tuple[list, list]:
        if not has_frames(document_elements(part.cut_from(document))):
            return [], [part]
        # Binary search over the number of frames: each try measures, nothing is decoded.
        fits, low, high = None, 1, self._processor.config.vision.max_frames
        while low <= high:
            middle = (low + high) // 2
            piece = replace(part, max_frames=middle)
            lengths = self._processor.measure(piece.cut_from(document))
            if self._why_too_long(lengths):
                high = middle - 1
            else:
                fits, low = (piece, lengths), middle + 1
        return ([fits], []) if fits else ([], [part])

    def _why_too_long(self, lengths: Lengths) -> str:
        return self._limits.why_exceeds(budget_lengths(lengths), lengths.image_patches)

    def _why(self, document: Document, part: _Part) -> str:
        why = self._why_too_long(self._processor.measure(part.cut_from(document)))
        turn = "" if part.turns == WHOLE else f"turn {part.turns[0] + 1} by itself: "
        item = "" if part.span == WHOLE else f"the medium at its token {part.span[0] + 1}, media counted as one: "
        return turn + item + why


@dataclass(frozen=True)
class FitPart:
    """The work on some of an index's long documents: writes their pieces."""

    index: Index
    policies: tuple[str, ...]
    processor: Processor

    def __call__(self, unit: Unit, folder: Path) -> dict:
        if self.index.limits is None:
            raise ValueError("an index without limits has no documents beyond them")
        fitter = Fitter(self.policies, self.processor, self.index.limits)
        parts, owners, left, handled = [], [], {}, Counter()
        for number in unit.content:
            try:
                fitted = fitter.fit(self.index.document(number))
            except SampleError as error:
                left[number] = str(error)
                continue
            parts += fitted.parts
            owners += [number] * len(fitted.parts)
            handled.update(fitted.policies)
            if fitted.left:
                left[number] = fitted.left
        write_columns(make_columns([lengths for _, lengths in parts]), folder, f"{unit.name}.")
        np.save(folder / f"{unit.name}.documents.npy", np.array(owners, np.int64))
        for name in ("turns", "span"):
            pairs = np.array([getattr(part, name) for part, _ in parts], np.int32).reshape(-1, 2)
            np.save(folder / f"{unit.name}.{name}.npy", pairs)
        np.save(folder / f"{unit.name}.max_frames.npy", np.array([part.max_frames for part, _ in parts], np.int32))
        return {"left": left, "handled": dict(handled)}


def check_policies(config: DataConfig) -> None:
    """Raises ConfigError for a policy that there is not."""
    given = {"data.oversize": config.oversize}
    given |= {f"source {source.name}: oversize": source.oversize or () for source in config.mixture}
    for name, policies in given.items():
        for policy in policies:
            if policy not in POLICIES:
                raise ConfigError(f"{name} {policy!r} is none of {', '.join(POLICIES)}")


def with_pieces(index: Index, policies: Sequence[str], processor: Processor, cache: Path, workers: int) -> Index:
    """Adds to an index what the policies make of its too long documents.

    Args:
        index: with limits (`Index.within`).
        policies: of `data.oversize`, tried in order.
        processor: measures pieces.
        cache: the folder where the outcome is kept, and found again.
        workers: processes that measure, where there is work for more than one.

    Returns:
        The index with its pieces.

    Raises:
        ConfigError: a cached outcome that is damaged.
    """
    folder = index.columns.folder
    if not policies or not len(index.over) or folder is None:
        return index
    described = f"{FORMAT} {folder.name} {index.limits} {','.join(policies)}"
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    plain = replace(index, over=NO_PIECES.documents)
    chunks = [index.over[start : start + _UNIT].tolist() for start in range(0, len(index.over), _UNIT)]
    units = [Unit(f"long-{place:06d}", key, chunk, len(chunk)) for place, chunk in enumerate(chunks)]
    out = cache / f"{folder.name}-{key}.oversize"
    job = Job(f"long documents of {index.name}", units, FitPart(plain, tuple(policies), processor), out)
    summaries = run_job(job, LocalRunner(workers if len(units) > 1 else 0), report=log.info)
    return replace(index, pieces=_read_pieces(job, summaries))


def _read_pieces(job: Job, summaries: list[dict]) -> Pieces:
    left = {int(number): why for summary in summaries for number, why in summary["left"].items()}
    handled = sum((Counter(summary["handled"]) for summary in summaries), Counter())
    try:
        read = lambda name: [np.load(job.out / f"{unit.name}.{name}.npy") for unit in job.units]  # noqa: E731
        whole: dict[str, Any] = {
            name: np.concatenate(read(name)) for name in (*NAMES, "documents", "turns", "max_frames", "span")
        }
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{job.out} is damaged ({error}): delete it, and it is made anew") from error
    images = [np.diff(places) for places in read("image_offsets")]
    whole["image_offsets"] = np.cumsum([0, *np.concatenate(images)]).astype(np.int64)
    return Pieces(
        documents=whole["documents"],
        turns=whole["turns"],
        max_frames=whole["max_frames"],
        spans=whole["span"],
        columns=Columns(**{name: whole[name] for name in NAMES}),
        left=left,
        handled=handled,
    )


def cut_chunks(runs: Sequence[Run], sizes: Sequence[Lengths], limits: RowLimits) -> tuple[list[Span], list[Span]]:
    """Cuts spans that an empty row holds, and those of media that none does, each with (some of) the text after it.

    `sizes` are what each run takes by itself. A chunk is as long as a row, but is cut before its last medium rather
    than in that one's text, unless it begins with it.
    """
    planner = _Planner(limits)
    too_long, skip = [], 0
    # From left to right, once: text fills chunks, a medium closes one it has no room in.
    for number, ((start, stop), run, size) in enumerate(
        (*placed, size) for placed, size in zip(place_runs(runs), sizes, strict=True)
    ):
        if isinstance(run, Ids):
            planner.add_text(start + skip, stop)
            skip = 0
        elif planner.exceeds(size):
            # What the medium is followed by goes with it: half a row at most, so that fewer frames may make it fit.
            after = runs[number + 1] if number + 1 < len(runs) else ()
            skip = min(len(after), planner.most_text // 2) if isinstance(after, Ids) else 0
            planner.close(start)
            planner.begin(stop + skip)
            too_long.append((start, stop + skip))
        else:
            planner.add_medium(start, size)
    planner.close(planner.end)
    return planner.chunks, too_long


class _Planner:
    """Collects items into chunks from left to right. `end` is the place after the items so far."""

    def __init__(self, limits: RowLimits):
        self._limits, self.chunks = limits, list[Span]()
        # What a chunk of text alone holds: every token may be a target.
        self.most_text = min(limits.budgets.tokens, limits.budgets.text_targets or limits.budgets.tokens)
        self.begin(0)

    def begin(self, place: int, size: Lengths = _NOTHING, items: int = 0) -> None:
        """Begins a new chunk at `place`, which has `items` items of `size` already."""
        self._start, self.end, self._size = place, place + items, size
        self._boundary: int | None = None  # where the last media begin that have text before them in the chunk
        self._since = _NOTHING  # what has come since, those media included
        self._in_text = False

    def close(self, place: int) -> None:
        """Ends the chunk at `place`; one without an item is none."""
        if place > self._start:
            self.chunks.append((self._start, place))

    def exceeds(self, size: Lengths) -> bool:
        return bool(self._limits.why_exceeds(budget_lengths(size), size.image_patches))

    def add_medium(self, place: int, size: Lengths) -> None:
        """Adds one medium, which an empty row holds."""
        # By itself it lacks what predicts its marks.
        size = replace(size, text_targets=min(size.text_targets + _MARKS, self.most_text))
        if self.exceeds(_sum(self._size, size)):
            self.close(place)
            self.begin(place, size, 1)
            return
        if self._in_text:
            self._boundary, self._since, self._in_text = place, _NOTHING, False
        self._size, self._since, self.end = _sum(self._size, size), _sum(self._since, size), place + 1

    def add_text(self, start: int, stop: int) -> None:
        """Adds the tokens from `start` until `stop`."""
        while stop - start > self._room():
            # Cut before the last medium, so that it keeps the text behind it.
            if self._boundary is not None:
                place, since = self._boundary, self._since
                self.close(place)
                self.begin(place, since, start - place)
                continue
            start += self._room()
            self.close(start)
            self.begin(start)
        text = Lengths(tokens=stop - start, text_targets=stop - start)
        self._in_text = self._in_text or stop > start
        self._size, self._since, self.end = _sum(self._size, text), _sum(self._since, text), stop

    def _room(self) -> int:
        return min(self._limits.budgets.tokens - self._size.tokens, self.most_text - self._size.text_targets)


def _sum(one: Lengths, other: Lengths) -> Lengths:
    return Lengths(**{name: value + getattr(other, name) for name, value in vars(one).items()})
