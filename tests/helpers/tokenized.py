"""The tokenizing command in processes of its own, over small parts, and the store that it leaves."""

import shutil
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tests.helpers.micro import CONFIG, REPOSITORY, environment, overrides, small_copy
from tests.helpers.proofs import HANG

# Documents of each manifest, and the fewest code frames that a part may have: about twenty parts.
LINES = 160
FLAGS = ("--part_frames=512",)


def start(
    root: Path | str, cache: Path, *flags: str, devices: int = 1, own_cache: Path | None = None
) -> subprocess.Popen:
    """Starts it on the data at `root`; `cache` keeps compiled programs, `own_cache` what else may be had again."""
    command = [
        sys.executable,
        str(REPOSITORY / "launch" / "tokenize_audio.py"),
        "--config",
        str(CONFIG),
        *FLAGS,
        *flags,
    ]
    command += [part for item in overrides(root) for part in ("--set", item)]
    pipe, variables = subprocess.PIPE, environment(cache, devices)
    if own_cache is not None:
        variables["XDG_CACHE_HOME"] = str(own_cache)
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=variables)


def run(root: Path, cache: Path, *flags: str, devices: int = 1) -> str:
    """Runs it to its end, which must be a good one; returns what it printed."""
    with start(root, cache, *flags, devices=devices) as process:
        out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, out + err
    return out


def start_hosts(
    root: Path | str, cache: Path, count: int, caches: Sequence[Path | None] = (None, None)
) -> list[subprocess.Popen]:
    """Starts it as `count` hosts of one device each; `caches` are the folders of what each may have again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ("--multihost", f"--coordinator=localhost:{port}", f"--hosts={count}")
    return [start(root, cache, *flags, f"--host={host}", own_cache=caches[host]) for host in range(count)]


def outputs_of(hosts: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """What each host printed, once all have ended well; none is left."""
    try:
        outputs = [process.communicate(timeout=HANG) for process in hosts]
    finally:
        for process in hosts:
            process.kill()
    assert [process.returncode for process in hosts] == [0] * len(hosts), outputs
    return outputs


def copy_data(sample: Path, root: Path) -> Path:
    """A part of the sample data, without anything made from it."""
    return small_copy(sample, root, LINES)


def without_store(root: Path, other: Path) -> Path:
    """The same data and indexes at `other`, no codes."""
    return Path(shutil.copytree(root, other, ignore=shutil.ignore_patterns("codes-*")))


def store_of(root: Path) -> Path:
    (path,) = (root / ".cache").glob("codes-*")
    return path


def parts_of(root: Path) -> int:
    """How many parts the store has."""
    return len(list((store_of(root) / "frames").glob("c.*")))


def part_time_of(root: Path) -> float:
    """Seconds that one part takes on this machine."""
    written = sorted(path.stat().st_mtime for path in (store_of(root) / "frames").glob("c.*"))
    return statistics.median(after - before for before, after in pairwise(written))


def files_of(root: Path) -> dict[str, bytes]:
    """Every file of the store; its lock says which process was at work."""
    store = store_of(root)
    paths = sorted(path for path in store.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(store)): path.read_bytes() for path in paths}
