"""The micro run for tests: part of the sample data, random codes in process, and the command in its own process."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from baichuan_omni_jax.config import MeshConfig, RunConfig, apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.omni.batch import BATCH_AXES
from baichuan_omni_jax.sharding import ShardingRules, make_mesh
from data_pipelines.audio_codes.store import CodeStore
from data_pipelines.audio_codes.writer import write_codes
from data_pipelines.pipeline import Pipeline, open_pipeline
from tests.helpers.proofs import HANG
from tests.helpers.windows import windows_of

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "micro.py"
# Documents of each source: all kinds of document, few enough that their audio has its codes in seconds.
LINES = 24
# Of the finished run: enough to be interrupted several times.
STEPS = 20
# Of a row of metrics.jsonl: every row has the first ones, some have the others too. They measure the machine; every
# other number must repeat exactly.
STEP_TIMES = {"step_time_s", "data_wait_s", "productive_s", "goodput", "tokens_per_s_per_chip", "compiles"}
TIMES = STEP_TIMES | {f"checkpoint_{name}" for name in ("s", "blocked_s", "bytes", "gb_per_s")}
TIMES |= {"host_rows_s", "host_send_s", "host_step_s"}


def small_copy(sample: Path, root: Path, lines: int = LINES) -> Path:
    """The sample data with the first `lines` documents of each manifest; media are hard links."""
    root.mkdir(parents=True)
    for path in sample.iterdir():
        if path.suffix == ".jsonl":
            (root / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
        elif path.is_dir() and not path.name.startswith("."):
            shutil.copytree(path, root / path.name, copy_function=os.link)
    return root


def overrides(root: Path | str) -> list[str]:
    return [f"data.root={root}", "data.sample=false"]


def micro_run(root: Path, *changes: str) -> RunConfig:
    return apply_overrides(load_run_config(CONFIG), [*overrides(root), *changes])


def open_micro(run: RunConfig, path: Path) -> tuple[Pipeline, CodeStore]:
    """The run's pipeline, and a store of random codes at `path` (found there by a second call)."""
    pipeline = open_pipeline(run.data, resolve_model(run.model))
    rng, sizes = np.random.default_rng(0), pipeline.omni.audio.codebook_sizes
    if not path.exists():
        codes = (
            (key, rng.integers(0, sizes, (item.window.code_frames, len(sizes))))
            for key, item in windows_of(pipeline).items()
        )
        write_codes(path, codes, fingerprint="random", codebook_sizes=sizes, window_rule={})
    return pipeline, CodeStore(path, "random")


def place(batch: dict[str, np.ndarray], mesh: Mesh, rules: ShardingRules) -> dict[str, jax.Array]:
    return {
        name: jax.device_put(value, NamedSharding(mesh, rules.spec(*BATCH_AXES[name]))) for name, value in batch.items()
    }


def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def environment(cache: Path, devices: int = 1, *, quick: bool = False) -> dict[str, str]:
    """CPU devices, the checkout's package, and compiled programs kept in `cache` for the next process.

    `quick` compiles with few optimizations: for tests whose time would else be compilation.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
    }


def run_on_devices(name: str, cache: Path, devices: int = 8) -> None:
    """Runs a program of `tests/helpers/multidevice` on so many CPU devices; fails with what it said where it fails."""
    program = REPOSITORY / "tests" / "helpers" / "multidevice" / name
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment(cache, devices),
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Command:
    """`launch/tpu_pretrain.py --config configs/micro.py` over one data root and one compilation cache."""

    def __init__(
        self,
        root: Path,
        cache: Path,
        script: Path = REPOSITORY / "launch" / "tpu_pretrain.py",
        *,
        quick: bool = False,
    ):
        self.root, self.cache, self.script, self.quick = root, cache, script, quick

    def start(self, workdir: Path | str, *changes: str, devices: int = 1, config: Path = CONFIG) -> subprocess.Popen:
        """`changes` are `key=value`; those that start with `--` are flags of the command."""
        sets = [item for item in (*overrides(self.root), *changes) if not item.startswith("--")]
        flags = [item for item in changes if item.startswith("--")]
        command = [sys.executable, str(self.script), "--config", str(config), "--workdir", str(workdir), *flags]
        command += [part for item in sets for part in ("--set", item)]
        pipe = subprocess.PIPE
        variables = environment(self.cache, devices, quick=self.quick)
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables)

    def __call__(
        self, workdir: Path | str, *changes: str, devices: int = 1, config: Path = CONFIG
    ) -> subprocess.CompletedProcess:
        with self.start(workdir, *changes, devices=devices, config=config) as process:
            out, err = process.communicate(timeout=HANG)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read_metrics(workdir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def numbers(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl without `TIMES`: what must repeat exactly."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(workdir)]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a saved step, `llm['embed']` or `opt_state['0']...`, read by Orbax alone."""
    reader, folder, found = ocp.PyTreeCheckpointHandler(), epath.Path(workdir) / "checkpoints" / str(step), {}
    for part in (*(folder / "params").iterdir(), folder / "opt_state"):
        # As numpy arrays, whatever devices the step was saved from.
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(part).tree)
        tree = reader.restore(part, args=ocp.args.PyTreeRestore(restore_args=wanted))
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {part.name + jax.tree_util.keystr(path): np.asarray(value) for path, value in leaves}
    return found


def wait_until(process: subprocess.Popen, happened: Callable[[], bool], seconds: float = HANG) -> bool:
    """Whether `happened()` while the process ran; False when it ended, or the time was up, before."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.002)
    return False


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file, to see that nothing was overwritten."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
