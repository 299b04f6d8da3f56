"""A process that probes and decodes files one after the other, as the data workers do, and tells how each one ended."""

import hashlib
import multiprocessing
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tests.helpers.faults.media_files import kind_of
from tests.helpers.proofs import HANG

ADDRESS_SPACE = 6 << 30  # bytes: above it an allocation fails


@dataclass(frozen=True)
class Outcome:
    """`cause` is that of the SampleError, "" when the file could be used; anything else that happened is in `bug`.

    `digest` tells what was decoded.
    """

    name: str
    cause: str = ""
    message: str = ""
    bug: str = ""
    digest: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0


def decode_all(paths: list[Path], limit: float) -> list[Outcome]:
    """The outcome of each file, decoded in another process; one that takes more than `limit` seconds is a hang.

    After a crash or a hang the others go to a new process.
    """
    outcomes: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(paths):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(theirs, paths[len(outcomes) :]), daemon=True)
        worker.start()
        theirs.close()
        assert ours.poll(HANG), "the process did not start"
        assert ours.recv() == "ready"
        _collect(ours, worker, paths, outcomes, limit)
        worker.kill()
        worker.join()
    return outcomes


def _collect(ours: Connection, worker, paths: list[Path], outcomes: list[Outcome], limit: float) -> None:
    while len(outcomes) < len(paths):
        name = paths[len(outcomes)].name
        if not ours.poll(limit):
            outcomes.append(Outcome(name, bug=f"hangs: nothing after {limit} s"))
            return
        try:
            outcomes.append(ours.recv())
        except EOFError:
            worker.join()
            outcomes.append(Outcome(name, bug=f"crashes: exit code {worker.exitcode}"))
            return


def _serve(pipe: Connection, paths: list[Path]) -> None:
    from data_pipelines.errors import SampleError

    decode = {"image": _decode_image, "audio": _decode_audio, "video": _decode_video}
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    pipe.send("ready")
    for path in paths:
        found, begun = {}, time.monotonic()
        try:
            found = {"digest": _digest(decode[kind_of(path.name)](path))}
        except SampleError as error:
            found = {"cause": error.cause, "message": str(error)}
        except BaseException as error:
            found = {"bug": f"raises {type(error).__name__}: {error}"}
        pipe.send(Outcome(path.name, **found, seconds=time.monotonic() - begun, peak_mib=_peak_mib()))


def _digest(arrays: list[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(str(array.shape).encode() + array.tobytes())
    return found.hexdigest()


def _peak_mib() -> float:
    """Of this process: `getrusage` also counts the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _decode_image(path: Path) -> list[np.ndarray]:
    from data_pipelines.media.images import decode_image, probe_image
    from data_pipelines.media.location import Media

    media = Media(path.name, path)
    height, width = probe_image(media)
    pixels = decode_image(media)
    assert pixels.shape == (height, width, 3), f"{pixels.shape} of {height}x{width}"
    return [pixels]


def _decode_audio(path: Path) -> list[np.ndarray]:
    from data_pipelines.media.audio import decode_audio, probe_audio
    from data_pipelines.media.location import Media

    media = Media(path.name, path)
    samples = probe_audio(media, 16000)
    wave = decode_audio(media, samples, 16000)
    assert wave.shape == (samples,)
    assert np.isfinite(wave).all()
    return [wave]


def _decode_video(path: Path) -> list[np.ndarray]:
    """Its frames and, when those can be used, its audio."""
    from data_pipelines.media.location import Media
    from data_pipelines.media.videos import read_video

    probe, frames = read_video(Media(path.name, path), 1.0, 8)
    frames = list(frames)
    assert len(frames) == len(probe.times)
    return [*frames, *_decode_audio(path)]
