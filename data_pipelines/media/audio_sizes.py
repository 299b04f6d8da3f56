"""Lengths that the headers of uncompressed audio files promise: WAV and its kin, AIFF, AU, CAF, W64, NIST SPHERE.

Recorders often cannot or do not write the sizes of a header rightly. `data_bytes` decides what is a promise.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedIOBase

PLACEHOLDER = 0x7FFF0000  # sizes from here to the largest (just under 2 GiB, and above) stand for "not known"
SLOPPY = 64  # bytes by which writers promise too much: they count the header, or a pad byte that they leave out
_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_TAIL = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"  # of the names of its other chunks


@dataclass(frozen=True)
class Promise:
    """What a header says of the length. Zeros and None where it says nothing."""

    samples: int | None = None  # how long the audio is, exactly: the file is known to hold them
    least: int = 0  # what the file must not fall short of
    rate: int = 0  # in Hz, of both counts
    channels: int = 0
    patched: tuple[tuple[int, bytes], ...] = ()  # sizes in the place of placeholders: (offset, bytes to be read there)
    damaged: int = 0  # parts that FFmpeg passes over in silence


@dataclass(frozen=True)
class _Form:
    """How samples lie in a file: bytes of one moment (all channels; 0: they are compressed)."""

    rate: int
    channels: int
    moment: int


def data_bytes(declared: int, start: int, size: int) -> int:
    """Returns the bytes of audio in a file of `size` bytes whose header declares `declared` bytes from `start` on.

    0 and everything from 0x7FFF0000 on are what writers leave that never came back to the header (to a pipe, or
    stopped): the audio goes to the end of the file. A size that is the whole file's, with or without its first 8
    bytes, or too large by at most 64 bytes, is a writer's habit. Any other is a promise.

    Raises ValueError when the file is shorter than its promise.

    >>> data_bytes(96000, 44, 96044), data_bytes(0x7FFFF000, 44, 96044), data_bytes(96044, 44, 96044)
    (96000, 96000, 96000)
    """
    # What the file holds, against what its header declares.
    there = max(0, size - start)
    if declared <= 0 or declared >= PLACEHOLDER:
        return there
    if declared - there > SLOPPY and declared not in (size, size - 8):
        raise ValueError(f"the file is truncated: {size} of {start + declared} bytes")
    return min(declared, there)


def check_riff(file: BufferedIOBase, size: int) -> Promise:
    """Checks the size of a RIFF file that is no WAVE (an AVI video): all that it promises."""
    file.seek(4)
    data_bytes(int.from_bytes(file.read(4), "little"), 8, size)
    return Promise()


def wave_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads WAV, RF64 and BW64. Only the size of the chunk `data` counts, in RF64 the one in `ds64`."""
    file.seek(0)
    head = file.read(12)
    form, long, place = None, None, 0
    for name, length, start in _chunks(file, 12, size, "<"):
        if name == b"fmt ":
            form = _wave_form(file.read(min(length, 40)))
        elif name == b"ds64" and head[:4] in (b"RF64", b"BW64"):
            long, place = int.from_bytes(file.read(16)[8:], "little"), start + 8
        elif name == b"data" and form is not None:
            declared = length if long is None else long
            # An empty `data` chunk with others behind it is empty; else a writer never came back to it.
            if declared == 0 and _ends_in_chunks(file, start, size):
                return Promise(0, 0, form.rate, form.channels)
            there = data_bytes(declared, start, size)
            patched = ((place, there.to_bytes(8, "little")),) if long is not None and there != declared else ()
            return replace(_promise(form, there), patched=patched)
    return Promise()


def _wave_form(chunk: bytes) -> _Form | None:
    if len(chunk) < 16:
        return None
    tag, channels, rate, _, moment, bits = struct.unpack("<HHIIHH", chunk[:16])
    if tag == 0xFFFE and len(chunk) >= 26:
        (tag,) = struct.unpack("<H", chunk[24:26])
    # PCM, floats, A-law and mu-law; blocks of any other code are known by decoding only.
    plain = tag in (1, 3, 6, 7) and bits in (8, 16, 24, 32, 64) and moment == channels * bits // 8
    return _Form(rate, channels, moment if plain else 0)


def aiff_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads AIFF and AIFF-C: the size of the chunk SSND, and where that is a placeholder the frames that COMM
    counts.
    """
    file.seek(4)
    whole, form, frames = int.from_bytes(file.read(4), "big"), None, 0
    for name, length, start in _chunks(file, 12, size, ">"):
        if name == b"COMM":
            form, frames = _aiff_form(file.read(min(length, 22)))
        elif name == b"SSND" and form is not None:
            offset = int.from_bytes(file.read(4), "big")
            declared = length - 8 - offset
            unknown = declared <= 0 or declared >= PLACEHOLDER
            there = data_bytes(frames * form.moment if unknown else declared, start + 8 + offset, size)
            sizes = (4, size - 8), (start - 4, there + 8 + offset)
            known = size > 2**32 or not (unknown or whole == 0)
            patched = () if known else tuple((place, value.to_bytes(4, "big")) for place, value in sizes)
            return replace(_exact(form, there, not unknown), patched=patched)
    return Promise()


def _aiff_form(chunk: bytes) -> tuple[_Form | None, int]:
    if len(chunk) < 18:
        return None, 0
    channels, frames, bits, exponent, mantissa = struct.unpack(">HIHHQ", chunk[:18])
    rate = round(mantissa * 2.0 ** min((exponent & 0x7FFF) - 16446, 900))
    code = chunk[18:22] or b"NONE"
    width = {b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1}.get(code, (bits + 7) // 8)
    plain = width if code in _AIFF_CODES else 0
    return _Form(rate, channels, channels * plain), frames


_AIFF_CODES = (b"NONE", b"twos", b"sowt", b"fl32", b"FL32", b"fl64", b"FL64", b"ulaw", b"ULAW", b"alaw", b"ALAW")


def au_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads Sun's AU."""
    file.seek(4)
    head = file.read(20)
    if len(head) < 20:
        return Promise()
    start, declared, code, rate, channels = struct.unpack(">IIIII", head)
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(code, 0)
    there = data_bytes(declared, start, size)
    patched = ((8, min(there, 2**32 - 1).to_bytes(4, "big")),) if there != declared else ()
    return replace(_exact(_Form(rate, channels, channels * width), there, declared == size - start), patched=patched)


def caf_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads Apple's CAF."""
    form, place = None, 8
    while place + 12 <= size:
        file.seek(place)
        name, length = struct.unpack(">4sq", file.read(12))
        place += 12
        if name == b"desc":
            rate, code, _, bytes_, frames, channels, _ = struct.unpack(">d4sIIIII", file.read(32))
            plain = code in (b"lpcm", b"ulaw", b"alaw") and frames == 1
            form = _Form(int(rate) if 0 < rate < 2**31 else 0, channels, bytes_ if plain else 0)
        elif name == b"data" and form is not None:
            there = data_bytes(length - 4, place + 4, size)
            return _exact(form, there, there == length - 4)
        if length < 0:
            break
        place += length
    return Promise()


def w64_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads Sony's Wave64: sizes have 64 bits and count the chunk's own 24 bytes."""
    file.seek(16)
    whole, form, place = int.from_bytes(file.read(8), "little"), None, 40
    while place + 24 <= size:
        file.seek(place)
        name, length = struct.unpack("<16sQ", file.read(24))
        if name[4:] == _W64_TAIL and name[:4] == b"fmt ":
            form = _wave_form(file.read(min(max(0, length - 24), 40)))
        elif name[4:] == _W64_TAIL and name[:4] == b"data" and form is not None:
            there = data_bytes(length - 24, place + 24, size)
            sizes = (16, size), (place + 16, there + 24)
            known = whole > 0 and there == length - 24
            patched = () if known else tuple((place, value.to_bytes(8, "little")) for place, value in sizes)
            return replace(_exact(form, there, there == length - 24), patched=patched)
        if length < 24:
            break
        place += (length + 7) // 8 * 8
    return Promise()


def sphere_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads NIST SPHERE, whose header is text."""
    file.seek(0)
    head = file.read(1024).decode("latin-1")
    start = re.match(r"NIST_1A\n\s*(\d{1,9})\n", head)
    fields = {name: int(value) for name, value in re.findall(r"^(\w+) -i (\d{1,18})\s*$", head, re.MULTILINE)}
    coding = re.search(r"^sample_coding -s\d+ (\S+)", head, re.MULTILINE)
    channels, width = fields.get("channel_count", 1), fields.get("sample_n_bytes", 0)
    if start is None or (coding and coding[1] not in ("pcm", "ulaw", "alaw", "mu-law")):
        return Promise(rate=fields.get("sample_rate", 0), channels=channels)
    form = _Form(fields.get("sample_rate", 0), channels, channels * width)
    declared = fields.get("sample_count", 0) * form.moment
    there = data_bytes(declared, int(start[1]), size)
    return _exact(form, there, declared == size - int(start[1]))


def is_w64(head: bytes) -> bool:
    """Tells whether a file that begins with `head` (16 bytes or more) is one."""
    return head.startswith(_W64_RIFF)


def _chunks(file: BufferedIOBase, place: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, declared length and start of the content of each chunk; the file stands at that start."""
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack(order + "4sI", file.read(8))
        yield name, length, place + 8
        place += 8 + length + length % 2


def _ends_in_chunks(file: BufferedIOBase, place: int, size: int) -> bool:
    """Tells whether what follows an empty `data` is no audio but chunks, up to the last byte of the file."""
    end = place
    for name, length, start in _chunks(file, place, size, "<"):
        if not name.isalnum() and not name.strip().isalnum():
            return False
        end = start + length
    return size - end in (0, -1, 1)


def _promise(form: _Form, there: int) -> Promise:
    return Promise(there // form.moment if form.moment else None, 0, form.rate, form.channels)


def _exact(form: _Form, there: int, plain: bool) -> Promise:
    """Returns a promise where nothing about the size is doubtful (`plain`), else rate and channels alone."""
    return _promise(form, there) if plain else Promise(rate=form.rate, channels=form.channels)
