"""Notices a step that does not end, names the host that it waits for, and ends the run so that it is started again.

On every host one thread tells the others by the coordination service where this host stands, and a second one looks at
the clock: the first may be held up by a host 0 that no longer answers.

WORKDIR/hangs/host_P.txt    the stacks of all threads of host P, each time it was found hung, and after SIGUSR1
"""

import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import IO, Any

from baichuan_omni_jax.config import WatchConfig
from baichuan_omni_jax.coordination import Hosts

log = logging.getLogger(__name__)

HANGS = "hangs"
# The exit code of a run that hung; as any but 0, 2 and 3, `launch/recipes/supervise` starts it again.
HANG_CODE = 76
# A file that is touched as long as this process can: `supervise --silent` ends one that cannot.
ALIVE = "SUPERVISE_ALIVE"
_BEATS = "watch/beat"
_LONGEST = 1e9  # seconds: of more, C makes an error
# Steps that a median is of, at most, and steps before it is trusted.
_WINDOW, _FEW = 32, 3


@dataclass(frozen=True)
class Stage:
    """What the main thread is at, since when (monotonic), and whether the deadline of a step holds for it."""

    step: int
    doing: str
    in_step: bool
    since: float


@dataclass
class Beat:
    """What a host said last, and when this host heard it first (monotonic)."""

    heard: float
    said: dict[str, Any] = field(default_factory=dict)


class Watchdog:
    """Watches one run on one host. `enter` and `finished` are for the main thread, and cost microseconds.

    Args:
        config: the deadlines.
        folder: where stacks go: the workdir, or a local copy of what is there.
        hosts: those of the run.
        on_hang: called with the step and the sentence before this process leaves, for at most half a minute.
        leave: ends the process.
    """

    def __init__(
        self,
        config: WatchConfig,
        folder: Path,
        hosts: Hosts,
        on_hang: Callable[[int, str], object] = lambda step, sentence: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._config, self._hosts, self._on_hang, self._leave = config, hosts, on_hang, leave
        self._path = folder / HANGS / f"host_{hosts.index}.txt"
        self._file: IO[str] | None = None
        limits = [seconds for seconds in (config.hang_s, config.silent_s, 20.0) if seconds > 0]
        self._period = min(limits) / 4
        self._stage = Stage(0, "starting", False, time.monotonic())
        self._times: deque[float] = deque(maxlen=_WINDOW)
        self._parts: deque[dict[str, float]] = deque(maxlen=_WINDOW)
        self._beats: dict[int, Beat] = {}
        self._reached = time.monotonic()  # when the service answered last
        self._sentence = ""
        self._ended, self._hurry = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins to watch."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written (%s): stacks of a hang go to stderr", self._path, error.strerror or error)
            self._file = os.fdopen(os.dup(2), "a", encoding="utf-8")
        # For a process whose Python no longer runs, or that was stopped: a handler in C writes where it stands.
        faulthandler.register(signal.SIGUSR1, self._file, all_threads=True)
        self._reached = time.monotonic()
        self.enter(self._stage.step, self._stage.doing, in_step=False)
        for name, work in (("watch-clock", self._watch), ("watch-talk", self._talk)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def enter(self, step: int, doing: str, *, in_step: bool = True) -> None:
        """Notes what the main thread is at from now on.

        Args:
            step: the step that it is at, or after.
            doing: in words, "reading rows".
            in_step: whether this is part of every step; else `watch.pause_s` is its limit.
        """
        self._stage = Stage(step, doing, in_step, time.monotonic())
        if self._file is not None and self._hosts.count > 1 and (limit := self._limit(self._stage)):
            # Should Python itself be stuck, or this process be stopped and go on later, C writes the stacks and leaves.
            # Alone it may go on: nobody has waited for it.
            faulthandler.dump_traceback_later(min(1.5 * limit, _LONGEST), exit=True, file=self._file)

    def finished(self, seconds: float, parts: Mapping[str, float]) -> None:
        """Notes how long a step took, and parts of that on this host, by name."""
        self._times.append(seconds)
        self._parts.append(dict(parts))

    def means_by_host(self) -> dict[int, dict[str, float]]:
        """Returns each host's means of the last steps' parts, as far as it has told."""
        if self._hosts.count == 1:
            return {0: self._means()}
        return {host: beat.said["parts"] for host, beat in sorted(self._beats.items()) if beat.said.get("parts")}

    def close(self) -> None:
        """Ends the watch, however the run ended."""
        if self._file is None:
            return
        self._ended.set()
        self._hurry.set()
        faulthandler.cancel_dump_traceback_later()
        for thread in self._threads:
            # The one that talks may wait for a host that is gone.
            thread.join(2 * self._period)
        faulthandler.unregister(signal.SIGUSR1)
        self._file, file = None, self._file
        # Empty as a rule. Somebody may have tidied up meanwhile, or the disk be full.
        with suppress(OSError):
            file.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def _means(self) -> dict[str, float]:
        parts = list(self._parts)
        return {name: fmean(part[name] for part in parts) for name in parts[-1]} if parts else {}

    def _limit(self, stage: Stage) -> float:
        """Returns the seconds that a stage may take; 0: any."""
        times = list(self._times)
        if not stage.in_step or len(times) < _FEW:
            return self._config.pause_s
        return max(self._config.hang_s, self._config.hang_factor * median(times)) if self._config.hang_s else 0.0

    def _talk(self) -> None:
        """Tells the other hosts where this one stands, and hears from them."""
        number = 0
        while True:
            number, stage, now = number + 1, self._stage, time.monotonic()
            said = {"beat": number, "step": stage.step, "doing": stage.doing, "for_s": now - stage.since}
            said |= {"parts": self._means(), "ended": self._ended.is_set(), "hung": self._sentence}
            try:
                self._hosts.put(f"{_BEATS}/{self._hosts.index}", json.dumps(said))
                told = self._hosts.below(_BEATS)
            except RuntimeError:  # host 0 does not answer: `_silent` notices how long
                told = {}
            else:
                self._reached = time.monotonic()
            for host, text in told.items():
                heard = json.loads(text)
                if heard["beat"] != self._beats.get(int(host), Beat(0.0, {"beat": 0})).said["beat"]:
                    self._beats[int(host)] = Beat(time.monotonic(), heard)
            if said["ended"]:
                return
            self._hurry.wait(self._period)
            if not self._ended.is_set():
                self._hurry.clear()

    def _watch(self) -> None:
        """Looks at the clock until a host is hung or the run ends."""
        alive = os.environ.get(ALIVE)
        looked = went_on = time.monotonic()
        while not self._ended.wait(self._period / 2):
            if alive:
                with suppress(OSError):
                    Path(alive).touch()
            gap, looked = time.monotonic() - looked, time.monotonic()
            if self._hosts.count > 1 and self._config.silent_s and gap > self._config.silent_s:
                return self._end(f"this process ({self._hosts.index}) was stopped for {gap:.0f} s")
            # Alone, a run that was stopped (Ctrl-Z) just goes on: until then no step has taken too long.
            went_on = looked if gap > 2 * self._period else went_on
            stage, limit = self._stage, self._limit(self._stage)
            took = time.monotonic() - max(stage.since, went_on)
            told = [beat.said["hung"] for beat in list(self._beats.values()) if beat.said["hung"]]
            if told:
                return self._end(told[0])
            if self._hosts.count > 1 and (silent := self._silent(self._config.silent_s)):
                return self._end(f"{silent} while this host was {stage.doing} ({stage.step})")
            if limit and took > limit:
                usual = f"; the median step takes {median(self._times):.3g} s" if self._times else ""
                return self._end(f"step {stage.step}: {stage.doing} for {took:.0f} s{usual}")

    def _silent(self, seconds: float) -> str:
        """Names the host of which nothing was heard for so long; "" where there is none, or `seconds` is 0."""
        now = time.monotonic()
        if not seconds:
            return ""
        if now - self._reached > seconds:
            return f"host 0, which has the coordination service, has not answered for {now - self._reached:.0f} s"
        for host, beat in sorted(list(self._beats.items())):
            if now - beat.heard > seconds and not beat.said["ended"]:
                at = f"{beat.said['doing']}, step {beat.said['step']}"
                return f"host {host} has given no sign of life for {now - beat.heard:.0f} s, its last was: {at}"
        return ""

    def _slowest(self) -> str:
        """Says which host the others wait for, from what all said last."""
        # Two more beats: a host that has stopped is silent since a short time only.
        time.sleep(2.5 * self._period)
        if silent := self._silent(2 * self._period):
            return silent
        beats = sorted(self._beats.items())
        step = min(beat.said["step"] for _, beat in beats)
        last = {host: beat.said for host, beat in beats if beat.said["step"] == step}
        # Whoever waits for the devices waits for the others.
        busy = {host: said for host, said in last.items() if said["doing"] != WAITING} or last
        if len(busy) == self._hosts.count and all(said["doing"] == WAITING for said in busy.values()):
            return f"all hosts are {WAITING} at step {step}"
        named = ", ".join(f"host {host} ({said['doing']} for {said['for_s']:.0f} s)" for host, said in busy.items())
        return f"the others wait for {named} at step {step}"

    def _end(self, reason: str) -> None:
        """Writes this host's stacks, tells the others, and leaves."""
        step, file = self._stage.step, self._file
        if file is None or self._ended.is_set():
            return
        # First of all, as whatever follows may hang as well. A disk that is full must not keep the process alive.
        with suppress(OSError):
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} at step {step}: {reason}\n")
            file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.cancel_dump_traceback_later()
        several = self._hosts.count > 1
        named = ""
        if several and "host " not in reason:
            with suppress(Exception):  # nothing that goes wrong here may keep the process alive
                named = self._slowest()
        sentence = reason if not named else f"{reason}; {named}"
        # The others leave as soon as they have heard it.
        self._sentence = sentence
        self._hurry.set()
        log.error("hung: %s; stacks are in %s; leaving with %d", sentence, self._path.parent, HANG_CODE)
        work = threading.Thread(target=self._on_hang, args=(step, sentence), daemon=True)
        work.start()
        work.join(30.0)
        # The others are to hear of it before this host leaves: above all before host 0 does, which has the service.
        if several:
            time.sleep(4 * self._period if self._hosts.index == 0 else 2 * self._period)
        for child in multiprocessing.active_children():
            child.kill()
        self._leave(HANG_CODE)


# What a host says that has done its part of a step.
WAITING = "waiting for the devices"


def describe_hosts(means: Mapping[int, Mapping[str, float]]) -> str:
    """Says of each time which hosts have the least and the most of it.

    >>> describe_hosts({0: {"rows_s": 0.01}, 1: {"rows_s": 0.5}, 2: {"rows_s": 0.02}})
    'rows_s 0.01 (host 0) to 0.5 (host 1)'
    """
    found = []
    for name in next(iter(means.values())):
        low, high = (choose(means, key=lambda host: means[host][name]) for choose in (min, max))
        found.append(f"{name} {means[low][name]:.3g} (host {low}) to {means[high][name]:.3g} (host {high})")
    return ", ".join(found)
