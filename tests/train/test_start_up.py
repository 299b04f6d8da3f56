"""What a start does before its first step: programs kept for the next one, a profiler that is served, SIGTERM."""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from rich.console import Console

from baichuan_omni_jax.config import ComputeConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.train.compile_cache import FOLDER, OFF, keep_compiled
from baichuan_omni_jax.train.profiling import serve_profiler
from baichuan_omni_jax.train.run import settle_blocks
from tests.helpers.micro import REPOSITORY

# A start that is at work outside of Python, or in it, once it has its signal handler.
PREPARING = """
import hashlib, sys, time
from baichuan_omni_jax.train.stop import StopSignal
stop = StopSignal(leave=75)
print("ready", flush=True)
try:
    {work}
except KeyboardInterrupt:
    assert stop.received
    sys.exit(76)
"""


@pytest.fixture
def no_cache():
    """JAX as it is where nobody has configured a cache, for a test; a test process may have one."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache")
def test_programs_are_kept_below_the_workdir(tmp_path):
    workdir = epath.Path(tmp_path)
    with keep_compiled(workdir, ""):
        folder = Path(jax.config.jax_compilation_cache_dir)
        assert folder.parent == tmp_path / FOLDER
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(lambda x: jnp.sin(x) * 12345.0)(jnp.ones(3)).block_until_ready()
        assert list(folder.iterdir())
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_programs_are_kept_elsewhere_or_nowhere(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with keep_compiled(workdir, str(tmp_path / "cache")):
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "cache"))
    with keep_compiled(workdir, OFF):
        assert jax.config.jax_compilation_cache_dir is None
    assert not (tmp_path / "run").exists()


def test_jax_s_own_settings_come_first(tmp_path, no_cache):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with keep_compiled(epath.Path(tmp_path), ""):
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--profiler-port {port} cannot be used"):
            serve_profiler(port)


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("time.sleep(600)", 76),
        ("hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2_000_000_000)", 75),
        ("stop.begin(); time.sleep(1); sys.exit(77 if stop.received else 1)", 77),
    ],
    ids=["in Python", "outside of Python", "a step has been done"],
)
def test_sigterm_before_and_after_the_first_step(work, code):
    line = [sys.executable, "-c", PREPARING.format(work=work)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == code


def test_blocks_of_attention_follow_the_first_rows():
    run = RunConfig(name="x", compute=ComputeConfig(attention_block="auto"))
    run = replace(run, data=replace(run.data, budgets=replace(run.data.budgets, tokens=65536)))
    short, long = (lambda count, row=row: [row] * count for row in ([1000] * 65, [65536]))
    console = Console(file=io.StringIO(), width=200)
    chosen = [settle_blocks(run, data, "tpu", console).compute for data in (short, long)]
    assert [(one.attention_q_block, one.attention_kv_block) for one in chosen] == [(256, 256), (512, 1024)]
    assert "compute.attention_block=auto: 512 x 1024 tokens, which visit 1.0" in console.file.getvalue()
    assert {one.attention_block for one in chosen} == {512}
    # Other platforms have their usual ones, and blocks that are given stay.
    assert settle_blocks(run, long, "cpu", console).compute.attention_block == 256
    given = replace(run, compute=ComputeConfig(attention_block=128))
    assert settle_blocks(given, long, "tpu", console) == given
