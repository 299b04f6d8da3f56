"""`launch/recipes/supervise`: what it starts again, what it leaves alone, and what becomes of signals."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.stand_ins import RECIPES, ended, wait_for

# A command that leaves with the codes of the file `codes`, one a start; `hang` waits for SIGTERM and leaves with 75.
COMMAND = """
number=$(cat count 2>/dev/null || echo 0); echo $((number + 1)) > count
code=$(sed -n "$((number + 1))p" codes)
trap 'exit 75' TERM
if [ "$code" = hang ]; then touch hanging; while true; do sleep 0.05; done; fi
exit $code
"""


def start(folder: Path, *codes: object, flags: tuple[str, ...] = ()) -> subprocess.Popen:
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    (folder / "command").write_text(COMMAND)
    supervise = ["bash", str(RECIPES / "supervise"), "--pause", "0", "--code", "code", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen([*supervise, "--", "bash", "command"], cwd=folder, stdout=pipe, stderr=pipe, text=True)


def starts(folder: Path) -> int:
    return int((folder / "count").read_text())


@pytest.mark.parametrize(
    ("codes", "left", "started"),
    [
        ([0], 0, 1),
        ([1, 139, 0], 0, 3),  # crashes are started again
        ([2, 0], 2, 1),  # what was given cannot be used
        ([1, 3, 0], 3, 2),  # it ended itself
        ([75, 75, 75, 75, 75, 0], 0, 6),  # stopped by another host: no crash, however often
        ([1, 1, 1, 1, 0], 1, 4),  # --restarts 3
        ([1, 1, 75, 1, 1, 0], 0, 6),  # in a row
    ],
)
def test_what_is_started_again(codes, left, started, tmp_path):
    code, said = ended(start(tmp_path, *codes, flags=("--restarts", "3")))
    assert (code, starts(tmp_path)) == (left, started), said
    assert (tmp_path / "code").read_text() == f"{left}\n"
    if left == 2:
        assert "starting it again would not help" in said


@pytest.mark.parametrize(
    ("codes", "left", "looked", "started"),
    [
        ([0], 0, 1, 1),
        ([1, 1, 0], 0, 3, 1),  # a machine that had only just started
        ([1, 1, 1], 2, 3, 0),
        ([2], 2, 1, 0),  # what was given cannot be used
    ],
)
def test_what_is_run_once_before(codes, left, looked, started, tmp_path):
    (tmp_path / "found").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "doctor").write_text('echo >> looked; exit "$(sed -n "$(wc -l < looked)p" found)"')
    code, said = ended(start(tmp_path, 1, 0, flags=("--first", "bash doctor")))
    assert code == left, said
    assert len((tmp_path / "looked").read_text().splitlines()) == looked
    assert (tmp_path / "count").exists() == bool(started)
    assert ("the command is not started" in said) == (not started)
    assert (tmp_path / "code").read_text() == f"{left}\n"


def test_a_signal_ends_what_is_run_before(tmp_path):
    process = start(tmp_path, 0, flags=("--first", "sleep 300"))
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert (code, (tmp_path / "count").exists()) == (143, False), said


def test_a_crash_after_a_healthy_while_is_the_first_one_again(tmp_path):
    code, _ = ended(start(tmp_path, 1, 1, 1, 1, 0, flags=("--restarts", "1", "--healthy", "0")))
    assert (code, starts(tmp_path)) == (0, 5)


def test_a_signal_reaches_the_command_and_ends_the_loop(tmp_path):
    process = start(tmp_path, "hang", 0)
    wait_for((tmp_path / "hanging").exists)
    assert not (tmp_path / "code").exists()
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert (code, starts(tmp_path)) == (143, 1), said


def test_a_signal_ends_a_pause(tmp_path):
    process = start(tmp_path, 1, 0, flags=("--pause", "300"))
    wait_for((tmp_path / "count").exists)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _ = ended(process)
    assert (code, starts(tmp_path)) == (143, 1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--retries", "3", "--", "true"], "no flag --retries"),
        (["--"], "needs a command"),
        (["--pause", "5m", "--", "true"], "pause must be a whole number of at least 0, not '5m'"),
        (["--restarts"], "restarts must be a whole number of at least 0, not ''"),
        (["--code"], "code_file must be given: a file, after --code"),
        (["--", "no-such-program"], "there is no command no-such-program"),
        (["--", "/etc/passwd"], "there is no command /etc/passwd, or it cannot be run"),
    ],
)
def test_flags_that_it_does_not_know_are_refused(arguments, sentence):
    done = subprocess.run(["bash", RECIPES / "supervise", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_stopped_command_is_asked_for_its_stacks_and_killed(tmp_path):
    """One that shows that it lives until it is stopped; the next start finishes."""
    (tmp_path / "command").write_text("""
if [ -f pid ]; then exit 0; fi
trap 'touch stacks' USR1
touch "$SUPERVISE_ALIVE"
echo $$ > pid.new && mv pid.new pid
while true; do touch "$SUPERVISE_ALIVE"; sleep 0.05; done
""")
    supervise = ["bash", str(RECIPES / "supervise"), "--pause", "0", "--silent", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen([*supervise, "--", "bash", "command"], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    wait_for((tmp_path / "pid").exists)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
    code, said = ended(process)
    assert code == 0, said
    assert "no sign of life for 1 s: killed" in said
    assert (tmp_path / "stacks").exists()
