"""SIGTERM while preparing, compiling, evaluating and saving: out within the grace, and nothing is lost. Slow."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import Workdir
from tests.helpers.micro import CONFIG, REPOSITORY, Command, environment, numbers, overrides, read_metrics, saved_arrays
from tests.helpers.proofs import wait_for

pytestmark = pytest.mark.slow

PHASES = REPOSITORY / "tests" / "helpers" / "faults" / "phases.py"
STEPS = 8
# Seconds from SIGTERM to the end that docs/how-to/launch.md states for steps and saves as short as these, and what a
# busy machine adds.
GRACE = 60.0
EVALUATED = """
from dataclasses import replace
from runpy import run_path

from baichuan_omni_jax.config import EvalConfig, EvalMixture, SourceConfig


def get_config():
    held_out = (EvalMixture(name="text", sources=(SourceConfig(name="text", manifest="text.jsonl"),)),)
    return replace(run_path(MICRO)["get_config"](), eval=EvalConfig(every=4, steps=2, mixtures=held_out))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "evaluated.py"
    path.write_text(f"MICRO = {str(CONFIG)!r}\n{EVALUATED}")
    return path


@pytest.fixture(scope="module")
def whole(quick_pretrain, config, tmp_path_factory) -> Path:
    """The run without a signal."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = quick_pretrain(workdir, f"train.steps={STEPS}", config=config)
    assert done.returncode == 0, done.stderr
    return workdir


def start(phase: str, command: Command, config: Path, workdir: Path, *flags: str) -> subprocess.Popen:
    line = [sys.executable, str(PHASES), phase, "--config", str(config), "--workdir", str(workdir), *flags]
    sets = [*overrides(command.root), f"train.steps={STEPS}"]
    line += ["--stopped-code=75", *(part for item in sets for part in ("--set", item))]
    pipe = subprocess.PIPE
    variables = environment(command.cache, quick=True)
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=variables)


def stop(processes: Sequence[subprocess.Popen], marker: Path, told: int = 0) -> list[str]:
    """Sends SIGTERM to one process when the phase has begun; all leave within the grace; what they wrote."""
    try:
        wait_for(marker.exists, marker.name, processes[0])
        began = time.monotonic()
        processes[told].send_signal(signal.SIGTERM)
        texts = ["".join(process.communicate(timeout=GRACE)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    print(f"{marker.suffix}: out after {time.monotonic() - began:.1f} s")
    assert [process.returncode for process in processes] == [75] * len(processes), texts
    return texts


def assert_same(workdir: Path, whole: Path) -> None:
    """All numbers, held-out scores among them, and all arrays of the last step."""
    assert {row["step"]: row for row in merged(workdir)} == {row["step"]: row for row in merged(whole)}
    expected, found = saved_arrays(whole, STEPS), saved_arrays(workdir, STEPS)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


def merged(workdir: Path) -> list[dict]:
    """One record a step: scores that were made by a later start have a line of their own."""
    found: dict[int, dict] = {}
    for row in numbers(workdir):
        row.pop("evaluation_interrupted", None)
        found[row["step"]] = found.get(row["step"], {}) | row
    return list(found.values())


@pytest.mark.parametrize("phase", ["prepare", "native"])
def test_before_the_first_step_it_leaves_at_once(phase, quick_pretrain, config, whole, tmp_path):
    workdir = tmp_path / "run"
    (text,) = stop([start(phase, quick_pretrain, config, workdir)], Path(f"{workdir}.{phase}"))
    assert "stopped by SIGTERM before the first step of this start; nothing is lost" in text
    done = quick_pretrain(workdir, f"train.steps={STEPS}", config=config)
    assert done.returncode == 0, done.stderr
    assert_same(workdir, whole)


def test_an_evaluation_is_broken_off_and_made_by_the_next_start(quick_pretrain, config, whole, tmp_path):
    workdir = tmp_path / "run"
    (text,) = stop([start("evaluate", quick_pretrain, config, workdir)], Path(f"{workdir}.evaluate"))
    assert "stopped by SIGTERM: step 4 is saved" in " ".join(text.split())
    assert Workdir(workdir, keep=3).latest_step() == 4
    assert read_metrics(workdir)[-1]["evaluation_interrupted"] == 1
    done = quick_pretrain(workdir, f"train.steps={STEPS}", config=config)
    assert done.returncode == 0, done.stderr
    assert_same(workdir, whole)


def test_an_evaluation_after_the_last_step_is_made_by_the_next_start(quick_pretrain, config, whole, tmp_path):
    """The steps are done, the run is not: the same command makes the scores."""
    workdir = tmp_path / "run"
    done = quick_pretrain(workdir, "train.steps=6", config=config)
    assert done.returncode == 0, done.stderr
    stop([start("evaluate", quick_pretrain, config, workdir)], Path(f"{workdir}.evaluate"))
    assert Workdir(workdir, keep=3).latest_step() == STEPS
    done = quick_pretrain(workdir, f"train.steps={STEPS}", config=config)
    assert done.returncode == 0, done.stderr
    rows = [row for row in read_metrics(workdir) if row["step"] == STEPS]
    expected = next(row for row in read_metrics(whole) if row["step"] == STEPS)
    assert rows[-1]["eval/text/loss"] == expected["eval/text/loss"]
    assert "is finished: step 8" in " ".join(
        quick_pretrain(workdir, f"train.steps={STEPS}", config=config).stdout.split()
    )


def test_a_save_is_finished_first(quick_pretrain, config, whole, tmp_path):
    workdir = tmp_path / "run"
    (text,) = stop([start("save", quick_pretrain, config, workdir)], Path(f"{workdir}.save"))
    last = read_metrics(workdir)[-1]["step"]
    assert f"stopped by SIGTERM: step {last} is saved" in " ".join(text.split())
    assert Workdir(workdir, keep=9).latest_step() == last
    done = quick_pretrain(workdir, f"train.steps={STEPS}", config=config)
    assert done.returncode == 0, done.stderr
    assert_same(workdir, whole)


@pytest.mark.parametrize("phase", ["prepare", "native", "evaluate"])
def test_two_hosts_leave_together(phase, quick_pretrain, config, tmp_path):
    """The signal goes to host 1; of `prepare` host 0 is at work while host 1 waits for it."""
    workdir = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ("--multihost", f"--coordinator=localhost:{port}", "--hosts=2", "--set", "mesh.data=2")
    hosts = [start(phase, quick_pretrain, config, workdir, *flags, f"--host={host}") for host in range(2)]
    texts = stop(hosts, Path(f"{workdir}.{phase}"), told=1)
    if phase == "evaluate":
        assert "stopped by SIGTERM: step 4 is saved" in " ".join(texts[0].split())
        assert Workdir(workdir, keep=3).latest_step() == 4
    else:
        assert all("before the first step of this start" in text for text in texts)
