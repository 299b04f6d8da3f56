"""What is made of documents beyond a budget: the policies of `data.oversize`, in order, on what is still too long.

`split`: consecutive turns together as long as they fit, each piece with the system prompt, its media and its loss; what
a turn refers to in an earlier piece is no longer seen. Pieces without anything to learn are left out.
`fewer_frames`: as many frames of each video as fit, at least one, evenly spread.
What no policy makes fit is skipped. The outcome is kept beside the index, so that documents are measured once.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from baichuan_omni_jax.config import ConfigError, DataConfig
from data_pipelines.columns import NAMES, Columns, make_columns, write_columns
from data_pipelines.document import Document, Lengths, SampleError
from data_pipelines.index import Index
from data_pipelines.jobs import Job, Unit, run_job
from data_pipelines.jobs.local import LocalRunner
from data_pipelines.pieces import NO_PIECES, WHOLE, Pieces
from data_pipelines.processor import Processor
from data_pipelines.row_limits import RowLimits, needs_of
from data_pipelines.turns import cut_turns, document_elements, has_frames

POLICIES = ("split", "fewer_frames")
FORMAT = 1  # of what is kept: raise it when the policies give something else than before
_UNIT = 4096  # documents
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """Some turns of a document (`WHOLE`: all), its videos of at most `max_frames` frames (0: as they are)."""

    turns: tuple[int, int] = WHOLE
    max_frames: int = 0

    def of(self, document: Document) -> Document:
        return replace(document, turns=None if self.turns == WHOLE else self.turns, max_frames=self.max_frames)


@dataclass
class Fitted:
    """What fits of a document, by turns; why something does not (""); the policies that something came of."""

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
        parts.sort(key=lambda made: made[0].turns)
        return Fitted(parts, self._why(document, left[0]) if left else "", policies)

    def _split(self, document: Document, part: _Part) -> tuple[list, list]:
        count = len(cut_turns(document_elements(document))[1])
        if part.turns != WHOLE or count < 2:
            return [], [part]
        made, left, start = [], [], 0
        while start < count:
            stop, best = start + 1, None
            while stop <= count:
                piece = replace(part, turns=(start, stop))
                try:
                    lengths = self._processor.measure(piece.of(document))
                except SampleError as error:
                    if error.cause != "no_loss":
                        raise
                    stop += 1
                    continue
                if self._beyond(lengths):
                    break
                best, stop = (piece, lengths), stop + 1
            if best:
                made.append(best)
                start = best[0].turns[1]
            elif stop > count:
                break  # nothing to learn in what is left
            else:
                left += [replace(part, turns=(start, start + 1))] * self._learns(document, part, start)
                start += 1
        return made, left

    def _learns(self, document: Document, part: _Part, turn: int) -> bool:
        try:
            self._processor.measure(replace(part, turns=(turn, turn + 1)).of(document))
        except SampleError:
            return False
        return True

    def _fewer_frames(self, document: Document, part: _Part) -> tuple[list, list]:
        if not has_frames(document_elements(part.of(document))):
            return [], [part]
        fits, low, high = None, 1, self._processor.config.vision.max_frames
        while low <= high:
            middle = (low + high) // 2
            piece = replace(part, max_frames=middle)
            lengths = self._processor.measure(piece.of(document))
            if self._beyond(lengths):
                high = middle - 1
            else:
                fits, low = (piece, lengths), middle + 1
        return ([fits], []) if fits else ([], [part])

    def _beyond(self, lengths: Lengths) -> str:
        return self._limits.why_beyond(needs_of(lengths), lengths.pictures)

    def _why(self, document: Document, part: _Part) -> str:
        why = self._beyond(self._processor.measure(part.of(document)))
        return why if part.turns == WHOLE else f"turn {part.turns[0] + 1} by itself: {why}"


@dataclass(frozen=True)
class FitPart:
    """The work on some of an index's long documents: writes their pieces."""

    index: Index
    policies: tuple[str, ...]
    processor: Processor

    def __call__(self, unit: Unit, folder: Path) -> dict:
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
        np.save(folder / f"{unit.name}.turns.npy", np.array([part.turns for part, _ in parts], np.int32).reshape(-1, 2))
        np.save(folder / f"{unit.name}.max_frames.npy", np.array([part.max_frames for part, _ in parts], np.int32))
        return {"left": left, "handled": dict(handled)}


def check_policies(config: DataConfig) -> None:
    """Raises ConfigError for a policy that there is not."""
    for policy in config.oversize:
        if policy not in POLICIES:
            raise ConfigError(f"data.oversize {policy!r} is none of {', '.join(POLICIES)}")


def with_pieces(index: Index, policies: Sequence[str], processor: Processor, cache: Path, workers: int) -> Index:
    """The index with what the policies make of its too long documents; found in `cache` or made by `workers`."""
    if not policies or not len(index.over):
        return index
    told = f"{FORMAT} {index.columns.folder.name} {index.limits} {','.join(policies)}"
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    plain = replace(index, over=NO_PIECES.documents)
    chunks = [index.over[start : start + _UNIT].tolist() for start in range(0, len(index.over), _UNIT)]
    units = [Unit(f"long-{place:06d}", key, chunk, len(chunk)) for place, chunk in enumerate(chunks)]
    out = cache / f"{index.columns.folder.name}-{key}.oversize"
    job = Job(f"long documents of {index.name}", units, FitPart(plain, tuple(policies), processor), out)
    summaries = run_job(job, LocalRunner(workers if len(units) > 1 else 0), report=log.info)
    return replace(index, pieces=_read_pieces(job, summaries))


def _read_pieces(job: Job, summaries: list[dict]) -> Pieces:
    left = {int(number): why for summary in summaries for number, why in summary["left"].items()}
    handled = sum((Counter(summary["handled"]) for summary in summaries), Counter())
    try:
        read = lambda name: [np.load(job.out / f"{unit.name}.{name}.npy") for unit in job.units]  # noqa: E731
        whole = {name: np.concatenate(read(name)) for name in (*NAMES, "documents", "turns", "max_frames")}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{job.out} is damaged ({error}): delete it, and it is made anew") from error
    pictures = [np.diff(places) for places in read("picture_places")]
    whole["picture_places"] = np.cumsum([0, *np.concatenate(pictures)]).astype(np.int64)
    columns = Columns(*(whole[name] for name in NAMES))
    return Pieces(whole["documents"], whole["turns"], whole["max_frames"], columns, left, handled)
