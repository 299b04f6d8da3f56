"""A step that does not end: who is named, what is on disk, with which code the process leaves.

Two real hosts of which one is stopped: tests/multidevice/test_hangs.py.
"""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from baichuan_omni_jax.config import WatchConfig
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.train.watchdog import HANG_CODE, WAITING, Watchdog, describe_hosts

# Of hosts that are threads: short, yet long beside what a busy machine delays a thread by.
QUICK = WatchConfig(hang_s=1.0, silent_s=2.0, pause_s=100.0)


class Service:
    """The keys of a coordination service; while `away` it does not answer."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.away = False

    def key_value_set(self, key: str, text: str, allow_overwrite: bool) -> None:
        if self.away:
            raise RuntimeError("UNAVAILABLE")
        self.keys[key] = text

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        if self.away:
            raise RuntimeError("UNAVAILABLE")
        return [(key, text) for key, text in list(self.keys.items()) if key.startswith(folder)]


class Watching(Watchdog):
    """A watchdog that notes what it would have done, and how."""

    def __init__(self, folder, hosts: Hosts | None = None, config: WatchConfig = QUICK) -> None:
        super().__init__(config, folder, hosts or Hosts(), self._report, self._note)
        self.left, self.code, self.sentence = threading.Event(), 0, ""
        self.stacks = folder / "hangs" / f"host_{hosts.index if hosts else 0}.txt"
        for _ in range(4):
            self.finished(0.01, {"rows_s": 0.001, "step_s": 0.01})

    def _report(self, step: int, sentence: str) -> None:
        self.sentence = sentence

    def _note(self, code: int) -> None:
        self.code = code
        self.left.set()


@pytest.fixture
def start() -> Iterator:
    """Starts watchdogs, and ends them after the test."""
    started = []

    def begin(watchdog: Watching) -> Watching:
        started.append(watchdog)
        watchdog.start()
        return watchdog

    yield begin
    for watchdog in started:
        watchdog.close()


def test_a_step_that_does_not_end_leaves_stacks_and_a_code(start, tmp_path):
    watchdog = start(Watching(tmp_path))
    watchdog.enter(7, "reading rows")
    assert watchdog.left.wait(30)
    assert watchdog.code == HANG_CODE
    assert watchdog.sentence.startswith("step 7: reading rows for 1 s")
    text = watchdog.stacks.read_text()
    assert "at step 7" in text
    assert "test_a_step_that_does_not_end_leaves_stacks_and_a_code" in text


def test_a_hang_ends_the_process_whatever_became_of_the_folder_for_stacks(start, tmp_path, capfd):
    """A file in the way at the start; a disk that is full by then."""
    (tmp_path / "hangs").write_text("in the way")
    watchdog = start(Watching(tmp_path))
    watchdog.enter(7, "reading rows")
    assert watchdog.left.wait(30)
    assert "step 7: reading rows for 1 s" in capfd.readouterr().err
    other = start(Watching(tmp_path / "other"))
    other._file.close()
    other._file = open("/dev/full", "a")  # noqa: SIM115 closed by close()
    other.enter(8, "reading rows")
    assert other.left.wait(30)


def test_a_folder_for_stacks_that_was_removed_meanwhile_ends_no_run(start, tmp_path):
    watchdog = start(Watching(tmp_path))
    shutil.rmtree(tmp_path / "hangs")
    watchdog.close()


def test_a_limit_of_years_is_no_error(start, tmp_path):
    config = WatchConfig(hang_s=1e300, pause_s=1e300)
    start(Watching(tmp_path, Hosts(0, 2, Service()), config)).enter(3, "compiling", in_step=False)


def test_steps_that_end_and_long_pauses_are_no_hang(start, tmp_path):
    watchdog = start(Watching(tmp_path))
    for step in range(30):
        watchdog.enter(step, WAITING)
        time.sleep(0.05)
    watchdog.enter(30, "evaluating", in_step=False)
    assert not watchdog.left.wait(2.5)
    watchdog.close()
    assert list(watchdog.stacks.parent.iterdir()) == []


def test_slow_steps_have_more_time(start, tmp_path):
    """Ten times the median."""
    watchdog = Watching(tmp_path)
    for _ in range(32):
        watchdog.finished(60.0, {"step_s": 60.0})
    start(watchdog).enter(5, WAITING)
    assert not watchdog.left.wait(2.5)


def test_a_host_that_is_slow_is_named_on_all(start, tmp_path):
    service = Service()
    waits, reads = (Watching(tmp_path, Hosts(host, 2, service)) for host in range(2))
    start(waits).enter(12, WAITING)
    start(reads).enter(12, "reading rows")
    assert waits.left.wait(30)
    assert reads.left.wait(30)
    assert any("the others wait for host 1 (reading rows for" in each.sentence for each in (waits, reads))
    assert waits.stacks.stat().st_size
    assert reads.stacks.stat().st_size


def test_a_host_without_a_sign_of_life_is_named(start, tmp_path):
    service = Service()
    service.keys["watch/beat/1"] = (
        '{"beat": 9, "step": 4, "doing": "reading rows", "for_s": 1.0, "parts": {}, "ended": false, "hung": ""}'
    )
    watchdog = start(Watching(tmp_path, Hosts(0, 2, service)))
    watchdog.enter(4, "evaluating", in_step=False)
    assert watchdog.left.wait(30)
    assert watchdog.sentence.startswith("host 1 has given no sign of life for 2 s, its last was: reading rows, step 4")


def test_a_host_that_has_finished_is_not_missed(start, tmp_path):
    service = Service()
    first, second = (start(Watching(tmp_path, Hosts(host, 2, service))) for host in range(2))
    time.sleep(0.5)
    second.close()
    first.enter(9, "saving", in_step=False)
    assert not first.left.wait(4)


def test_a_service_that_does_not_answer_is_host_zero(start, tmp_path):
    service = Service()
    watchdog = start(Watching(tmp_path, Hosts(1, 2, service)))
    watchdog.enter(4, WAITING, in_step=False)
    service.away = True
    assert watchdog.left.wait(30)
    assert "host 0, which has the coordination service, has not answered for 2 s" in watchdog.sentence


def test_hosts_are_compared_by_their_own_times(start, tmp_path):
    service = Service()
    first, second = (Watching(tmp_path, Hosts(host, 2, service)) for host in range(2))
    for _ in range(32):
        second.finished(0.01, {"rows_s": 0.3, "step_s": 0.01})
    start(second), start(first)
    end = time.monotonic() + 30
    while len(first.means_by_host()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert (
        describe_hosts(first.means_by_host())
        == "rows_s 0.001 (host 0) to 0.3 (host 1), step_s 0.01 (host 0) to 0.01 (host 0)"
    )


ALONE = """
import sys, time
from pathlib import Path
from baichuan_omni_jax.config import WatchConfig
from baichuan_omni_jax.coordination import Hosts
from baichuan_omni_jax.train.watchdog import Watchdog

watchdog = Watchdog(WatchConfig(hang_s=1.0, silent_s=2.0), Path(sys.argv[1]), Hosts())
for _ in range(4):
    watchdog.finished(0.01, {"step_s": 0.01})
watchdog.start()
print("steps", flush=True)
begin = time.monotonic()
while time.monotonic() - begin < 6:
    watchdog.enter(5, "reading rows")
    time.sleep(0.05)
watchdog.close()
"""


def test_a_run_alone_that_was_stopped_for_long_just_goes_on(tmp_path):
    """As by Ctrl-Z: nobody has waited for it."""
    with subprocess.Popen([sys.executable, "-c", ALONE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "steps\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
    assert not list((tmp_path / "hangs").iterdir())
