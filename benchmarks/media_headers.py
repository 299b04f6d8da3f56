"""Do headers that lie change how long a sound is?

    python benchmarks/media_headers.py [--json] [--cases 2400] [--seed 0]

Two seconds of sound in every container that is read, with one or two fields of its headers (lengths, sizes, rates,
clocks) set to something else. Each file is measured and decoded, and decoded by ffmpeg: it must come out as long as
measured and within 20 ms of ffmpeg's, or be refused with a cause and a sentence; a process must not die, nor take a
minute. Films take part with their sound, and with their number of frames at 2 a second.

Versions of FFmpeg differ (5.1 plays the encoder's delay of AAC in Matroska, 8 leaves it out as the header says), so
the length may be that of the command `ffmpeg` or of FFmpeg's libraries as PyAV brings them. Where packets are damaged,
ffmpeg leaves them out; ours may be as long as the undamaged file, with silence in their places. What ffmpeg does not
open at all (some placeholders of sizes in AIFF, AU, W64 and RF64) may be refused, or be as long as the undamaged file.

Allowances are counted: `header_lies_allowed` are the files neither refused nor within 20 ms of the command `ffmpeg`, by
the allowance that each needs; their names go to the standard error.
"""

import argparse
import io
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import soundfile
from rows import emit, row

RATE = 16000  # Hz that lengths are compared at
CAUSES = ("unreadable_media", "too_big_media", "silent_audio")
# Seconds: that lengths may differ by; that a file may take; that ffmpeg decodes, a little more than a sound may have.
CLOSE, LIMIT, LONGEST = 0.020, 60, 7300
FRAMES_A_SECOND = 2.0

Fields = list[tuple[int, int]]  # offset, bytes


@dataclass(frozen=True)
class Original:
    """A file as it should be, and the places of the numbers in its headers. `film`: it has pictures."""

    name: str
    data: bytes
    fields: Fields
    film: bool = False

    @cached_property
    def seconds(self) -> float:
        """Of the file as it should be."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            path.write_bytes(self.data)
            return decode_libraries(path)


@dataclass(frozen=True)
class Outcome:
    """Of one file: why it was refused ("": it was not), what was `wrong`, and which allowance it needs, if any."""

    name: str
    cause: str = ""
    wrong: str = ""
    allowance: str = ""
    lengths: str = ""  # ours and theirs, where an allowance is needed


@cache
def originals() -> tuple[Original, ...]:
    """One file of every container."""
    rng = np.random.default_rng(0)
    time = np.arange(32000) / RATE
    wave = (0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)) + 0.02 * rng.standard_normal(32000)).astype(np.float32)
    made = []
    for name, form, subtype in _PLAIN:
        file = io.BytesIO()
        soundfile.write(file, wave, RATE, format=form, subtype=subtype)
        made.append(Original(name, file.getvalue(), _WALKERS[form](file.getvalue())))
    for name, form, codec, options, walker in _CODED:
        data = _encode(wave, form, codec, options, film=False)
        made.append(Original(name, data, walker(data)))
    for name, form, codec, walker in _FILMS:
        data = _encode(wave, form, codec, {}, film=True)
        made.append(Original(name, data, walker(data), film=True))
    return tuple(each for each in made if each.fields)


def _encode(wave: np.ndarray, form: str, codec: str, options: dict[str, str], film: bool) -> bytes:
    # At another rate the same samples are another sound, which is as good here.
    rate = {"libopus": 48000, "mp2": 48000, "wmav2": 44100}.get(codec, 22050 if form == "flv" else RATE)
    wave = np.tile(wave, max(1, rate // RATE))
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        if codec == "wmav2":
            track.bit_rate = 64000
        if film:
            pictures = container.add_stream("mpeg4" if form != "webm" else "libvpx", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 96, 64, "yuv420p"
            for number in range(20):
                picture = np.full((64, 96, 3), 10 * number + 20, np.uint8)
                container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(pictures.encode(None))
        step = track.codec_context.frame_size or 1024
        for start in range(0, len(wave), step):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + step], format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return file.getvalue()


# Where numbers lie


def _chunks(data: bytes, place: int = 12, order: str = "<") -> Fields:
    """Of RIFF and AIFF: every size, and everything in small chunks."""
    found = [(4, 4)]
    while place + 8 <= len(data):
        name, size = struct.unpack(order + "4sI", data[place : place + 8])
        found.append((place + 4, 4))
        if name == b"LIST" and data[place + 8 : place + 12] != b"movi":
            place += 12
            continue
        if name == b"idx1" or size <= 128:
            found += [(place + 8 + n, 4 if size - n >= 4 else 2) for n in range(0, min(size, 256) - 1, 4)]
            found += [(place + 8 + n, 2) for n in range(0, min(size, 18) - 1, 2)]
        place += 8 + size + size % 2
    return [(start, width) for start, width in found if start + width <= len(data)]


def _head(length: int, *widths: int) -> Callable[[bytes], Fields]:
    """Every place of these widths in the first `length` bytes."""
    return lambda data: [(n, width) for width in widths for n in range(4, min(length, len(data)) - width, width)]


def _digits(data: bytes) -> Fields:
    """Of a header that is text: every digit."""
    return [(n, 1) for n in range(8, 1024) if chr(data[n]).isdigit()]


_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf", b"mvex", b"udta")


def _boxes(data: bytes, place: int = 0, end: int | None = None) -> Fields:
    found, end = [], len(data) if end is None else end
    while place + 8 <= end:
        size, name = struct.unpack(">I4s", data[place : place + 8])
        found.append((place, 4))
        if name in _CONTAINERS:
            found += _boxes(data, place + 8, place + size)
        elif name not in (b"mdat", b"free", b"ftyp", b"meta"):
            found += [(n, 4) for n in range(place + 12, min(place + size, place + 120) - 3, 4)]
        place += max(size, 8)
    return found


_MASTERS = ("18538067", "1549a966", "1654ae6b", "ae", "e1", "e0", "1f43b675", "a0")


def _elements(data: bytes, place: int = 0, end: int | None = None) -> Fields:
    """Of Matroska: sizes and small values of elements, and clocks of blocks."""
    found, end = [], len(data) if end is None else end
    while place + 2 < end and data[place]:
        start = place
        place += 9 - data[place].bit_length()
        name = data[start:place].hex()
        if place >= end or not data[place]:
            break
        width = 9 - data[place].bit_length()
        size = int.from_bytes(data[place : place + width], "big") & (1 << 7 * width) - 1
        found.append((place, width))
        place += width
        if name in _MASTERS:
            found += _elements(data, place, min(end, place + size))
        elif name in ("a3", "a1"):
            found.append((place + 1, 2))
        elif name not in ("1a45dfa3", "114d9b74", "1c53bb6b", "63a2") and size <= 8:
            found.append((place, size))
        place += size
    return found


def _every(mark: bytes, *places: tuple[int, int]) -> Callable[[bytes], Fields]:
    """These (place, width) after every `mark`."""

    def walk(data: bytes) -> Fields:
        found, start = [], -1
        while (start := data.find(mark, start + 1)) >= 0:
            found += [(start + place, width) for place, width in places if start + place + width <= len(data)]
        return found

    return walk


def _mpeg(data: bytes) -> Fields:
    tag = max(data.find(b"Xing"), data.find(b"Info"))
    return [*[(tag + n, 4) for n in (4, 8, 12)] * 12, (tag + 140, 3), *_every(data[:2], (1, 1), (2, 1), (3, 1))(data)]


_OGG = _every(b"OggS", (5, 1), (6, 8), (14, 4), (18, 4), (26, 1))
_PLAIN = [
    ("pcm.wav", "WAV", "PCM_16"),
    ("float.wav", "WAV", "FLOAT"),
    ("extended.wav", "WAVEX", "PCM_24"),
    ("long.wav", "RF64", "PCM_16"),
    ("a.aiff", "AIFF", "PCM_16"),
    ("a.au", "AU", "ULAW"),
    ("a.caf", "CAF", "PCM_16"),
    ("a.w64", "W64", "PCM_16"),
    ("a.sph", "NIST", "PCM_16"),
    ("vorbis.ogg", "OGG", "VORBIS"),
]
_WALKERS = {
    "WAV": _chunks,
    "WAVEX": _chunks,
    "RF64": _chunks,
    "AIFF": lambda data: _chunks(data, order=">"),
    "AU": _head(24, 4),
    "CAF": _head(120, 4, 8),
    "W64": _head(120, 4, 8),
    "NIST": _digits,
    "OGG": _OGG,
}
_CODED = [
    (
        "a.flac",
        "flac",
        "flac",
        {},
        lambda data: [*_head(26, 1, 2, 4)(data), *_every(b"\xff\xf8", (2, 1), (4, 1))(data)],
    ),
    ("xing.mp3", "mp3", "libmp3lame", {"write_xing": "1"}, _mpeg),
    ("streamed.mp3", "mp3", "libmp3lame", {"write_xing": "0"}, _every(b"\xff\xf3", (1, 1), (2, 1), (3, 1))),
    ("a.aac", "adts", "aac", {}, _every(b"\xff\xf1", (2, 1), (3, 2), (5, 2))),
    ("a.mp2", "mp2", "mp2", {}, _every(b"\xff\xfd", (2, 1), (3, 1))),
    ("opus.ogg", "ogg", "libopus", {}, _OGG),
    ("flac.ogg", "ogg", "flac", {}, _OGG),
    ("a.m4a", "mp4", "aac", {}, _boxes),
    ("lossless.m4a", "mp4", "alac", {}, _boxes),
    ("parts.m4a", "mp4", "aac", {"movflags": "frag_every_frame+empty_moov"}, _boxes),
    ("pcm.mov", "mov", "pcm_s16le", {}, _boxes),
    ("opus.webm", "webm", "libopus", {}, _elements),
    ("live.webm", "webm", "libopus", {"live": "1"}, _elements),
    ("aac.mkv", "matroska", "aac", {}, _elements),
    ("flac.mkv", "matroska", "flac", {}, _elements),
    ("a.ts", "mpegts", "aac", {}, _every(b"\x00\x00\x01\xc0", (4, 2), (9, 2), (11, 2))),
    ("a.avi", "avi", "libmp3lame", {}, _chunks),
    ("pcm.avi", "avi", "pcm_s16le", {}, _chunks),
    ("a.flv", "flv", "libmp3lame", {}, _head(400, 1, 2, 4)),
    ("a.wma", "asf", "wmav2", {}, _head(500, 2, 4)),
]
_FILMS = [
    ("film.mp4", "mp4", "aac", _boxes),
    ("film.mkv", "matroska", "aac", _elements),
    ("film.webm", "webm", "libopus", _elements),
    ("film.avi", "avi", "libmp3lame", _chunks),
    ("film.ts", "mpegts", "aac", _every(b"\x00\x00\x01\xe0", (4, 2), (9, 2), (11, 2))),
]


def mutants(count: int, seed: int) -> Iterator[tuple[Original, bytes]]:
    """The originals by turns, each with a field or two set to another value. The seed decides all of it."""
    rng, kinds = np.random.default_rng(seed), originals()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        data = bytearray(kind.data)
        for _ in range(int(rng.integers(1, 3))):
            start, width = kind.fields[int(rng.integers(len(kind.fields)))]
            order = ("little", "big")[int(rng.integers(2))]
            if kind.name == "a.sph":
                data[start] = 48 + int(rng.integers(10))
                continue
            value = _other(rng, int.from_bytes(data[start : start + width], order), 8 * width)
            data[start : start + width] = value.to_bytes(width, order)
        yield kind, with_checksums(bytes(data)) if kind.name.endswith(".ogg") else bytes(data)


def _other(rng: np.random.Generator, old: int, bits: int) -> int:
    most = (1 << bits) - 1
    small, half = int(rng.integers(1, 100)), 1 << bits - 1
    choices = (
        0,
        1,
        most,
        half,
        half - 1,
        0x7FFFF000,
        old + small,
        old - small,
        2 * old,
        old // 2,
        old ^ 1 << small % bits,
    )
    return (*choices, int(rng.integers(1 << min(bits, 62))))[int(rng.integers(len(choices) + 1))] & most


@cache
def _checksum(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


def with_checksums(data: bytes) -> bytes:
    """With the checksums that its pages must have: pages without are left out by every reader."""
    out, start = bytearray(data), data.find(b"OggS")
    while start >= 0:
        end = data.find(b"OggS", start + 4)
        page = bytearray(out[start : end if end >= 0 else len(out)])
        page[22:26] = bytes(4)
        value = 0
        for byte in page:
            value = value << 8 & 0xFFFFFFFF ^ _checksum(value >> 24 ^ byte)
        out[start + 22 : start + 26] = struct.pack("<I", value)
        start = end
    return bytes(out)


# Ours and ffmpeg's


def decode_ours(path: Path, film: bool) -> tuple[str, str, float, int]:
    """Cause and sentence of the refusal, or seconds of sound and damaged packets; runs in a process of its own."""
    from data_pipelines.errors import SampleError
    from data_pipelines.media.audio import probe_audio, read_audio
    from data_pipelines.media.location import Media
    from data_pipelines.media.videos import decode_frames, probe_video

    media = Media(path.name, path)
    try:
        if film:
            times = probe_video(media, FRAMES_A_SECOND, 32).times
            found = len(decode_frames(media, times))
            if found != len(times):
                return "", f"{found} frames of {len(times)}", 0.0, 0
        samples = probe_audio(media, RATE)
        heard = read_audio(media, RATE)
    except SampleError as error:
        return error.cause, str(error), 0.0, 0
    differs = f"measured {samples}, decoded {len(heard.wave)} samples" if samples != len(heard.wave) else ""
    return "", differs, len(heard.wave) / RATE, heard.damaged


def decode_libraries(path: Path) -> float:
    """Seconds of sound that FFmpeg's libraries decode; damaged packets are left out, as its command does."""
    seconds = 0.0
    with suppress(av.error.FFmpegError), av.open(str(path)) as container:
        for packet in container.demux(container.streams.audio[0]):
            with suppress(av.error.FFmpegError):
                seconds += sum(frame.samples / frame.sample_rate for frame in packet.decode())
    return seconds


def decode_peer(path: Path) -> float:
    """Seconds of sound that the command ffmpeg decodes, if there is one."""
    if shutil.which("ffmpeg") is None:
        return decode_libraries(path)
    command = ["ffmpeg", "-v", "quiet", "-nostdin", "-t", str(LONGEST), "-i", path, "-map", "0:a:0"]
    with subprocess.Popen([*command, "-f", "s16le", "-ac", "1", "-ar", str(RATE), "-"], stdout=subprocess.PIPE) as run:
        size = 0
        while part := run.stdout.read(1 << 20):
            size += len(part)
    return size / 2 / RATE


def compare(count: int, seed: int, folder: Path) -> list[Outcome]:
    """The outcome of each of `count` files, written to `folder`, where those that came out wrong stay."""
    outcomes, pool = [], None
    for number, (kind, data) in enumerate(mutants(count, seed)):
        path = folder / f"{number}-{kind.name}"
        path.write_bytes(data)
        pool = pool or ProcessPoolExecutor(1, get_context("spawn"))
        try:
            ours = pool.submit(decode_ours, path, kind.film).result(LIMIT)
        except BrokenProcessPool:
            pool, ours = None, ("", "the process died", 0.0, 0)
        except Exception as error:
            ours = "", f"{type(error).__name__}: {error}", 0.0, 0
        outcomes.append(_judge(path, kind, *ours))
        if not outcomes[-1].wrong:
            path.unlink()
    if pool is not None:
        pool.shutdown()
    return outcomes


def _judge(path: Path, kind: Original, cause: str, sentence: str, seconds: float, damaged: int) -> Outcome:
    name = path.name
    if cause:
        good = cause in CAUSES and name in sentence and str(path.parent) not in sentence and "<" not in sentence
        return Outcome(name, cause, "" if good else f"{cause}: {sentence}")
    if sentence:
        return Outcome(name, wrong=sentence)
    # The command decides; only where it differs are the others asked.
    theirs = {"": decode_peer(path)}
    if abs(seconds - theirs[""]) > CLOSE:
        theirs["as FFmpeg's libraries"] = decode_libraries(path)
        if damaged or not any(theirs.values()):
            theirs["undamaged length, damaged packets" if damaged else "undamaged length, ffmpeg opens nothing"] = (
                kind.seconds
            )
    told = f"{seconds:.3f} s with {damaged} damaged packets, by ffmpeg "
    told += ", ".join(f"{other:.3f}" for other in theirs.values()) + " s"
    for allowance, other in theirs.items():
        if abs(seconds - other) <= CLOSE:
            return Outcome(name, allowance=allowance, lengths=told if allowance else "")
    return Outcome(name, wrong=told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--cases", type=int, default=2400, help="files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leaves the files that came out wrong there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = compare(options.cases, options.seed, folder)
    for outcome in outcomes:
        if outcome.wrong or outcome.allowance:
            print(outcome.name, outcome.wrong or f"({outcome.allowance}) {outcome.lengths}", file=sys.stderr)
    wrong, causes = sum(bool(each.wrong) for each in outcomes), Counter(each.cause or "used" for each in outcomes)
    note = f"{len(outcomes)} files: " + ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    peer = "ffmpeg" if shutil.which("ffmpeg") else "PyAV"
    line = row("header_lies_wrong", wrong, "files", peer=peer, goal="== 0", ok=wrong == 0, note=note)
    allowances = Counter(each.allowance for each in outcomes if each.allowance)
    note = ", ".join(f"{count} {allowance}" for allowance, count in allowances.most_common())
    allowed = row("header_lies_allowed", allowances.total(), "files", peer=peer, note=note)
    used = causes["used"] / len(outcomes)
    rows = [line, allowed, row("header_lies_used", used, "of the files", goal=">= 0.2", ok=used >= 0.2)]
    return emit(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
