"""Rows that several hosts hold parts of: each host decodes them whole, and all keep the same documents of them.

What one host cannot decode, or decodes to other values than the others, is padding on all. Hosts tell each other a
digest of every such row by the coordination service, which needs no device. Where digests differ they tell what each
document of the row came out as, drop those that are not alike, decode the row again without them, and compare anew:

    host 0    row 3: 7a1c    documents 11 22 lost    decoded without the third: 90fe
    host 1    row 3: b002    documents 11 22 33      decoded without the third: 90fe

(docs/decisions/0114).
"""

import json
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data_pipelines.packing.row_decoder import RowDecoder, SharedRow, Step
from data_pipelines.packing.step_plan import PackedRow

_Lost = dict[int, dict[int, tuple[str, str, str]]]  # row of the step -> place in the row -> why, as in `Step.failed`


@runtime_checkable
class HostTexts(Protocol):
    """Texts by key that hosts exchange: `baichuan_omni_jax.coordination.Hosts` is one."""

    @property
    def index(self) -> int: ...

    def put(self, key: str, text: str) -> None: ...

    def wait(self, key: str) -> str: ...

    def remove(self, folder: str) -> None: ...

    def meet(self, text: str) -> list[str]: ...


class Agreement:
    """Makes rows alike on the hosts that share them. All hosts make one, and read the same steps in the same order.

    Args:
        held: the rows of a step that each host holds a part of, by their places in it, ascending.
        hosts: how they talk.
    """

    def __init__(self, held: Mapping[int, Sequence[int]], hosts: HostTexts) -> None:
        self._hosts, self._rows = hosts, tuple(held[hosts.index])
        self._group = _connected(hosts.index, held)
        others = {row for host in self._group if host != hosts.index for row in held[host]}
        self.shared = tuple(row for row in self._rows if row in others)
        self._readings = count()
        self._ended: list[int] = []  # readings whose last texts nobody has removed yet

    def agree(self, steps: Iterator[Step], decoder: RowDecoder, ahead: int = 0) -> Iterator[Step]:
        """Returns `steps` with rows that are alike on all hosts that have them.

        Args:
            steps: this host's, with `Step.shared`; closed with what is returned.
            decoder: what decoded them.
            ahead: steps that are read before a step is given, at most one: the other hosts have told of it by then.
                It need not be the same on all.
        """
        if not self.shared:
            return steps
        ended, self._ended = self._ended, []
        return self._agreed(next(self._readings), steps, decoder, ahead, ended)

    def union(self, lost: Mapping[int, str]) -> dict[int, str]:
        """Returns the causes of all hosts' lost documents by number. Every host must call it, sharing rows or not."""
        told = [json.loads(text) for text in self._hosts.meet(json.dumps(list(lost.items())))]
        # The same causes on all: those of the first host that has lost a document.
        return {number: cause for pairs in reversed(told) for number, cause in pairs}

    def _agreed(
        self, reading: int, steps: Iterator[Step], decoder: RowDecoder, ahead: int, ended: list[int]
    ) -> Iterator[Step]:
        waiting: deque[Step] = deque()
        settled = 0
        try:
            for told, step in enumerate(steps):
                self._tell(f"{reading}/{told}", "0", _row_digests(step))
                waiting.append(step)
                if len(waiting) <= ahead:
                    continue
                agreed = self._settle(f"{reading}/{settled}", waiting.popleft(), decoder)
                # Who has told of this step has settled the second one before it, however far each host reads ahead,
                # and left the readings before.
                stale = [f"{past}/" for past in ended] if not settled else []
                stale += [f"{reading}/{settled - 2}/"] if settled > 1 else []
                for folder in stale:
                    self._hosts.remove(f"rows/{self._hosts.index}/{folder}")
                settled += 1
                yield agreed
            while waiting:
                yield self._settle(f"{reading}/{settled}", waiting.popleft(), decoder)
                settled += 1
        finally:
            self._ended.append(reading)
            if (close := getattr(steps, "close", None)) is not None:
                close()

    def _settle(self, folder: str, step: Step, decoder: RowDecoder) -> Step:
        """Returns the step with the documents that all hosts of its rows have alike."""
        lost: _Lost = {row: {} for row in self.shared}
        for attempt in count():
            told = self._hear(folder, str(attempt))
            differing = [row for row in _all_rows(told) if len(set(_of_row(told, row).values())) > 1]
            if not differing:
                return step
            # All of the group go on, whichever of them have the row. What was lost stays lost, so this ends.
            self._tell(folder, f"{attempt}d", _row_outcomes(step, differing))
            outcomes = self._hear(folder, f"{attempt}d")
            for row in set(differing) & set(self.shared):
                lost[row] |= self._losses(_of_row(outcomes, row), step.shared[row].row, decoder)
            step = self._without(step, lost, decoder)
            self._tell(folder, str(attempt + 1), _row_digests(step))
        raise AssertionError("attempts do not end")

    def _losses(
        self, outcomes: Mapping[int, list[Any]], row: PackedRow, decoder: RowDecoder
    ) -> dict[int, tuple[str, str, str]]:
        """Returns why documents of a row are dropped, by their place: lost on a host, or not the same on all."""
        lost = {}
        for place, (source, number) in enumerate(row):
            found = {host: documents[place] for host, documents in outcomes.items()}
            whys = {host: outcome for host, outcome in found.items() if isinstance(outcome, list)}
            if whys:
                # A host's own reason comes first: the others' are named by host.
                host = self._hosts.index if self._hosts.index in whys else min(whys)
                where, cause, message = whys[host]
                lost[place] = where, cause, message if host == self._hosts.index else f"host {host}: {message}"
            elif len(set(found.values())) > 1:
                named = " and ".join(str(host) for host in found)
                where = decoder.indexes[source].location(number)
                lost[place] = where, "differs", f"hosts {named}, which share its row, decode it to different values"
        return lost

    def _without(self, step: Step, lost: _Lost, decoder: RowDecoder) -> Step:
        """Decodes those rows of a step again of which this host has documents that are lost."""
        failed, damaged, shared = dict(step.failed), dict(step.damaged), dict(step.shared)
        # Copies: arrays of workers lie in memory that is theirs.
        batch = {name: np.array(values) for name, values in step.batch.items()}
        frames = batch["mel"].shape[2] if "mel" in batch else 0
        for place, dropped in lost.items():
            row = shared[place].row
            failed |= {row[document]: why for document, why in dropped.items()}
            if all(shared[place].digests[document] is None for document in dropped):
                continue
            again = decoder.decode([row], frames, digested=(0,), dropped={0: dropped})
            for name, values in again.batch.items():
                batch[name][self._rows.index(place)] = values[0]
            failed |= again.failed
            damaged = {key: packets for key, packets in damaged.items() if key not in row} | again.damaged
            shared[place] = SharedRow(row, again.digests[0])
        return replace(step, batch=batch, failed=failed, damaged=damaged, shared=shared)

    def _tell(self, folder: str, name: str, rows: Mapping[int, Any]) -> None:
        self._hosts.put(f"rows/{self._hosts.index}/{folder}/{name}", json.dumps(list(rows.items())))

    def _hear(self, folder: str, name: str) -> dict[int, dict[int, Any]]:
        """Returns what each host of the group tells, by row, once all have told it."""
        return {host: dict(json.loads(self._hosts.wait(f"rows/{host}/{folder}/{name}"))) for host in self._group}


def _connected(host: int, held: Mapping[int, Sequence[int]]) -> list[int]:
    """Lists the hosts that share rows with `host`, or with one that does, and so on; itself among them."""
    found, rows = {host}, set(held[host])
    while more := {other for other in set(held) - found if rows & set(held[other])}:
        found |= more
        rows |= {row for other in more for row in held[other]}
    return sorted(found)


def _all_rows(told: Mapping[int, Mapping[int, Any]]) -> list[int]:
    return sorted({row for rows in told.values() for row in rows})


def _of_row(told: Mapping[int, Mapping[int, Any]], row: int) -> dict[int, Any]:
    return {host: rows[row] for host, rows in told.items() if row in rows}


def _row_digests(step: Step) -> dict[int, int]:
    return {row: zlib.crc32(json.dumps(found.digests).encode()) for row, found in step.shared.items()}


def _row_outcomes(step: Step, rows: Sequence[int]) -> dict[int, list[Any]]:
    """Returns of each row what its documents came out as: their digests, or why they were lost."""
    return {
        row: [
            list(step.failed[key]) if digest is None else digest
            for key, digest in zip(step.shared[row].row, step.shared[row].digests, strict=True)
        ]
        for row in rows
        if row in step.shared
    }
