"""How fast is a checkpoint saved and restored, and how much is read back while it is saved?

    python benchmarks/checkpoints.py [--json] [--gigabytes 4] [--hosts 2] [--directory DIR]

Hosts are processes of this machine with two CPU devices each, joined as the hosts of a pod are. They save a state of
the given size (parameters and two moments, split over all devices), and restore it; what each process read and wrote
is the kernel's count (`/proc/self/io`, system calls: also what the page cache held). Needs the state's room on disk,
and three times that in memory.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import emit, row

ROOT = Path(__file__).resolve().parents[1]
TENSORS, DEVICES = 24, 2
GOAL_BACK = 0.01


def io_bytes() -> dict[str, int]:
    """Bytes that this process has read and written so far, by system calls."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(counts["rchar"]), "written": int(counts["wchar"])}


def measured(work: Any) -> dict[str, float]:
    """Seconds, and bytes read and written, of `work()`."""
    before, start = io_bytes(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - start, io_bytes()
    return {"seconds": seconds} | {name: after[name] - before[name] for name in after}


def host(workdir: str, gigabytes: float, coordinator: str, hosts: int, number: int) -> None:
    """One host: saves, restores, and prints what that took."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    from baichuan_omni_jax.checkpoint import Workdir
    from baichuan_omni_jax.config import tiny

    jax.distributed.initialize(coordinator, hosts, number)
    mesh = jax.make_mesh((hosts * DEVICES,), ("fsdp",))
    rows = int(gigabytes * 1e9 / 3 / TENSORS / 4 / 4096) // (hosts * DEVICES) * hosts * DEVICES
    shape, sharding = (rows, 4096), NamedSharding(mesh, PartitionSpec("fsdp"))

    def tensor(seed: int) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start = index[0].start or 0
            return np.arange(start, start + rows // (hosts * DEVICES), dtype=np.float32)[:, None] + np.full(
                (1, 4096), seed, np.float32
            )

        return jax.make_array_from_callback(shape, sharding, part)

    class Branch(nnx.Module):
        def __init__(self) -> None:
            for number in range(TENSORS):
                setattr(self, f"tensor_{number}", nnx.Param(tensor(number)))

    branch = Branch()
    moments = [{f"tensor_{number}": tensor(100 * which + number) for number in range(TENSORS)} for which in (1, 2)]
    run = Workdir(workdir, keep=1)

    def save() -> None:
        run.save(1, {"llm": branch}, moments, {}, tiny())
        run.wait()

    found = []

    def restore() -> None:
        describe = lambda tree: jax.tree.map(  # noqa: E731
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )
        found.append(run.restore(None, {"llm": describe(branch)}, describe(moments)))

    multihost_utils.sync_global_devices("begin")
    results = {"save": measured(save)}
    multihost_utils.sync_global_devices("saved")
    results["restore"] = measured(restore)
    multihost_utils.sync_global_devices("restored")
    read = jax.tree.leaves((found[0].branches["llm"], found[0].opt_state))
    for old, new in zip(jax.tree.leaves((branch, moments)), read, strict=True):
        assert bool(jnp.array_equal(old, new))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((branch, moments)))
    print(json.dumps(results | {"bytes": size}))
    run.close()


def measure(workdir: Path, gigabytes: float, hosts: int) -> list[dict]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    given = ["--workdir", str(workdir), "--gigabytes", str(gigabytes), "--hosts", str(hosts)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *given, "--coordinator", coordinator, "--host", str(number)],
            stdout=subprocess.PIPE,
            env=os.environ | variables,
            text=True,
        )
        for number in range(hosts)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("a host failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    rows, size = [], found[0]["bytes"]
    for what in ("save", "restore"):
        seconds = max(one[what]["seconds"] for one in found)
        note = f"{size / 1e9:.2f} GB, {hosts} hosts; {seconds:.1f} s"
        rows.append(row(f"{what} speed", size / seconds / 1e9, "GB/s", note=note))
    back = sum(one["save"]["read"] for one in found) / sum(one["save"]["written"] for one in found)
    rows.append(row("read back while saving", back, "of bytes written", goal=f"<= {GOAL_BACK}", ok=back <= GOAL_BACK))
    once = sum(one["restore"]["read"] for one in found) / size
    return [*rows, row("read to restore", once, "of the state's bytes", goal="<= 1.01", ok=once <= 1.01)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--directory", help="where the temporary folder is made")
    for name in ("workdir", "coordinator", "host"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workdir:
        host(options.workdir, options.gigabytes, options.coordinator, options.hosts, int(options.host))
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        return emit(measure(Path(folder) / "run", options.gigabytes, options.hosts), options.json)


if __name__ == "__main__":
    sys.exit(main())
