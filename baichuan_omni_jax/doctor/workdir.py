"""The workdir put to the test: what a run does there, with a folder of its own that is removed again.

Write, list, read back and compare, rename a folder as a commit does, remove; rates of writing and reading. On several
hosts: whether all see the same folder.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from baichuan_omni_jax.doctor.report import Hosts, Line, Setting, Verdict, first_sentence, join, silent_hosts, sized
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import is_url, parse_path, remove, renames_folders

PROBE_BYTES = 64 * 2**20
_PIECE = 8 * 2**20
# Below this a save of gigabytes takes minutes: bytes a second of one file, written and read by one process.
SLOW = 50e6
# How soon what one host wrote must be seen by the others.
SEEN_SECONDS = 30.0


def check_workdir(setting: Setting) -> Iterator[Line]:
    """Probes `setting.workdir`, a folder or a URL."""
    if not setting.workdir:
        yield Line("workdir", Verdict.OK, "not looked at: give --workdir DIR or URL")
        _pass_by(setting.hosts)
        return
    try:
        workdir = parse_path(setting.workdir)
        made = _made_parents(workdir)
    # A URL that nothing here serves says so itself.
    except (ConfigError, OSError) as error:
        if isinstance(error, ConfigError):
            yield Line("workdir", Verdict.FAIL, str(error))
        else:
            yield _refusal(setting.workdir, "cannot be made", error)
        _pass_by(setting.hosts)
        return
    probe = workdir / f".doctor-{setting.hosts.index}-{os.getpid()}"
    try:
        yield from _probe_lines(workdir, probe)
        if setting.hosts.count > 1:
            yield from _shared_lines(workdir, setting)
    finally:
        # Whatever happened, nothing stays: neither files nor the folders above that were not there. A bucket that
        # refused to be written refuses this too, in its own way.
        with contextlib.suppress(Exception):
            remove(probe)
        silent_hosts(setting.hosts, _LEFT)
        _remove_empty(made)


# Where hosts wait for one another: with a file for the others, after looking for theirs, and when all is removed.
_SEEN, _LOOKED, _LEFT = "seen", "looked", "left"


def _pass_by(hosts: Hosts) -> None:
    """Goes by the places where the other hosts wait: this one has no workdir to show."""
    for name in (_SEEN, _LOOKED, _LEFT):
        hosts.gather(name, "")


def _made_parents(workdir: epath.Path) -> list[epath.Path]:
    """Makes the workdir and what is missing above it; returns what was made, deepest first."""
    if is_url(workdir):
        return []  # a bucket has no folders to make
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError:
        _remove_empty(missing)  # those that could be made
        raise
    return missing


def _remove_empty(folders: list[epath.Path]) -> None:
    """Removes folders, deepest first, that are there and hold nothing."""
    for folder in folders:
        # epath's own word for a folder that is not empty is ValueError.
        with contextlib.suppress(OSError, ValueError):
            folder.rmdir()


def _probe_lines(workdir: epath.Path, probe: epath.Path) -> Iterator[Line]:
    """Writes, lists and reads in the folder `probe`, and says how a checkpoint is committed."""
    # One file, in pieces that differ, written through to the disk.
    data = os.urandom(_PIECE)
    try:
        probe.mkdir()
        start = time.perf_counter()
        write_probe(probe / "data", data, PROBE_BYTES)
        wrote = PROBE_BYTES / (time.perf_counter() - start)
        (probe / "folder").mkdir()
        (probe / "folder" / "small").write_text("probe")
    # Clients of buckets have errors of their own, which are no OSError.
    except Exception as error:
        yield _refusal(str(workdir), "cannot be written", error)
        return
    names = sorted(path.name for path in probe.iterdir())
    if names != ["data", "folder"]:
        text = f"{workdir}: a file and a folder with a file were written, a list has {names or 'nothing'}"
        yield Line("workdir", Verdict.FAIL, text, "a run finds its checkpoints by listing: use another store")

    # Back again: bytes that are not those that were written are no place for checkpoints.
    start = time.perf_counter()
    same = read_probe(probe / "data", data, PROBE_BYTES)
    read = PROBE_BYTES / (time.perf_counter() - start)
    values = {"write_bytes_per_s": wrote, "read_bytes_per_s": read, "bytes": PROBE_BYTES}
    text = f"{workdir}: {sized(PROBE_BYTES)} written at {sized(wrote)}/s, read at {sized(read)}/s"
    if not same:
        text = f"{workdir}: what was read is not what was written"
        yield Line("workdir", Verdict.FAIL, text, "no checkpoint is safe there: use another store", values)
    elif min(wrote, read) < SLOW:
        advice = "so fast is a checkpoint saved: a local disk, or a bucket in the machine's region, is faster"
        yield Line("workdir", Verdict.WARN, text, advice, values)
    else:
        yield Line("workdir", Verdict.OK, text, values=values)
    yield _commit_line(workdir)


def write_probe(path: epath.Path, data: bytes, size: int) -> None:
    """Writes `size` bytes, `data` over and over, and waits until they are stored. Raises OSError as the store does."""
    with path.open("wb") as file:
        for piece in range(size // len(data)):
            # Each piece begins with its number, so that one in another's place is seen.
            file.write(piece.to_bytes(8, "little") + data[8:])
        file.flush()
        _forget(file, sync=True)


def read_probe(path: epath.Path, data: bytes, size: int) -> bool:
    """Reads what `write_probe` wrote; returns whether it is that."""
    same = True
    with path.open("rb") as file:
        for piece in range(size // len(data)):
            same &= file.read(len(data)) == piece.to_bytes(8, "little") + data[8:]
        return same and not file.read(1)


def _forget(file: Any, *, sync: bool) -> None:
    """Writes a local file through and drops it from the host's memory, where reading it would measure nothing."""
    # Files of a bucket have no descriptor: they are stored when they are closed.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        descriptor = file.fileno()
        if sync:
            os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _commit_line(workdir: epath.Path) -> Line:
    """Says how a checkpoint appears whole there: by renaming its folder, or by a file that is written last."""
    if is_url(workdir):
        return Line("workdir", Verdict.OK, f"{workdir}: a checkpoint is committed by a file that is written last")
    # As a run finds it out at its start.
    if renames_folders(workdir):
        return Line("workdir", Verdict.OK, f"{workdir}: folders can be renamed, which commits a checkpoint")
    text = f"{workdir}: folders cannot be renamed; a checkpoint is committed by a file that is written last"
    advice = "that holds; a bucket is better named by its URL (gs://...) than mounted"
    return Line("workdir", Verdict.WARN, text, advice)


def _shared_lines(workdir: epath.Path, setting: Setting) -> Iterator[Line]:
    """Compares what hosts see: a file of each one's must be there for all."""
    hosts = setting.hosts
    name = f".doctor-seen-{hosts.index}-{os.getpid()}"
    # What refuses it was told before.
    with contextlib.suppress(Exception):
        (workdir / name).write_text("seen")
    told = hosts.gather(_SEEN, name)
    # Network file systems show a new file a little later.
    end, missing = time.monotonic() + SEEN_SECONDS, [host for host, text in enumerate(told) if text]
    while missing := [host for host in missing if not (workdir / str(told[host])).exists()]:
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    silent_hosts(hosts, _LOOKED)  # a file must stay until every host has looked for it
    with contextlib.suppress(Exception):
        remove(workdir / name)
    if missing:
        text = f"{workdir}: files of {join([f'host {host}' for host in missing])} are not to be seen on this host"
        yield Line("workdir", Verdict.FAIL, text, "all hosts need the same workdir: a bucket or a network file system")
    else:
        yield Line("workdir", Verdict.OK, f"{workdir}: the same on all {hosts.count} hosts")


def _refusal(workdir: str, what: str, error: BaseException) -> Line:
    """Makes the line of a workdir that is refused, with the advice for the most common reasons."""
    reason = getattr(error, "strerror", None) or first_sentence(error)
    advice = "name a workdir that this user may write: `touch` a file there first"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "make room, or name another workdir"
    elif is_url(workdir):
        advice = (
            "does the bucket exist, and may this machine's account write to it? `gcloud storage cp` a file there first"
        )
    return Line("workdir", Verdict.FAIL, f"{workdir} {what}: {reason}", advice)
