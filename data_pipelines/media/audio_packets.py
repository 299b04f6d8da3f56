"""Lengths of compressed audio files, found from the headers of their packets without decoding: FLAC, MP3, Ogg Opus.

A number in a header is taken for the length only where the packets up to the file's end agree with it; else it is what
the file must not fall short of. MP4 and Matroska tell whether the file is whole.
"""

import struct
import zlib
from functools import lru_cache
from io import BufferedIOBase

from data_pipelines.media.audio_sizes import Promise

_SEARCHED = 1 << 18  # bytes at the end of a FLAC file that its last frame is looked for in
_WALKED = 1 << 26  # bytes of an MP3 or Ogg file whose packets are counted; of a larger one everything is decoded


def tag_bytes(file: BufferedIOBase) -> int:
    """Returns the bytes of the ID3v2 tags at the file's beginning."""
    place = 0
    while True:
        file.seek(place)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
            return place
        a, b, c, d = head[6:]
        place += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)


# FLAC

_UNKNOWN_TOTAL = (1 << 36) - 1  # all bits set, as some streamers leave it; the format itself has 0 for it


def flac_promise(file: BufferedIOBase, size: int, start: int) -> Promise:
    """Reads the promise of a FLAC file that begins at `start`. Its header may count 0 samples: nobody knew."""
    file.seek(start + 4)
    block = file.read(38)
    if len(block) < 38 or block[0] & 0x7F or block[1:4] != b"\0\0\x22":
        return Promise()
    # STREAMINFO: block sizes, then rate, channels and the count of samples in packed bits.
    least, most = struct.unpack(">HH", block[4:8])
    packed = int.from_bytes(block[14:22], "big")
    rate, channels, total = packed >> 44, (packed >> 41 & 7) + 1, packed & _UNKNOWN_TOTAL
    total = 0 if total == _UNKNOWN_TOTAL else total
    file.seek(max(start + 42, size - _SEARCHED))
    whole = total > 0 and _last_flac_frame(file.read(), total, most if least == most else 0)
    return Promise(total if whole else None, total, rate, channels)


def _last_flac_frame(tail: bytes, total: int, block: int) -> bool:
    """Tells whether a whole frame at the end of `tail` ends with sample number `total`."""
    place = len(tail)
    while (place := tail.rfind(b"\xff", 0, place)) >= 0:
        head = tail[place : place + 16]
        if len(head) == 16 and head[1] in (0xF8, 0xF9) and _flac_end(head, block) == total:
            return _crc(tail[place:], 0x8005, 16) == 0
    return False


def _flac_end(head: bytes, block: int) -> int | None:
    """Returns the number of the sample after this frame; None when it is no header of one. `block` is the fixed size,
    or 0.
    """
    number, place = head[4], 5
    ones = 8 - (~number & 0xFF).bit_length()  # at the front: so many bytes has the number, as UTF-8 writes it
    if ones in (1, 8):
        return None
    if ones:
        number &= (1 << 7 - ones) - 1
        for byte in head[5 : 4 + ones]:
            number = number << 6 | byte & 0x3F
        place = 4 + ones
    code = head[2] >> 4
    sizes = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}, **{n: 256 << n - 8 for n in range(8, 16)}}
    extra = {6: 1, 7: 2}.get(code, 0)
    length = int.from_bytes(head[place : place + extra], "big") + 1 if extra else sizes.get(code, 0)
    place += extra + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if not length or _crc(head[: place + 1], 0x07, 8):
        return None
    return number + length if head[1] == 0xF9 or not block else number * block + length


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """Computes the remainder: 0 where `data` ends with its own checksum."""
    table, mask, value = _crc_table(polynomial, bits), (1 << bits) - 1, 0
    for byte in data:
        value = (value << 8 ^ table[value >> bits - 8 ^ byte]) & mask
    return value


@lru_cache
def _crc_table(polynomial: int, bits: int) -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
        table.append(value & (1 << bits) - 1)
    return tuple(table)


# MP3

_RATES = (44100, 48000, 32000)
_KILOBITS = {  # by (version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def mpeg_promise(file: BufferedIOBase, size: int) -> Promise:
    """Reads the frames that a Xing, Info or VBRI header of an MP3 file counts; exact if they are those of the file.

    A file of two that were joined has more frames than the first one's header counts.
    """
    start = tag_bytes(file)
    file.seek(start)
    data = file.read(_WALKED)
    first = _mpeg_frame(data, 0)
    if first is None:
        return Promise()
    _, block, rate = first
    frames, delay, padding = _mpeg_header(data, block)
    if not frames:
        return Promise(rate=rate)
    # What encoder and decoder add at both ends is no part of the clip.
    skipped = delay + 529 if delay is not None else 0  # 529: a decoder's own delay
    left = max(0, padding - 529)
    samples = max(0, frames * block - skipped - left)
    exact = delay is not None and len(data) == size - start and _mpeg_frames(data, block, rate) == frames + 1
    return Promise(samples if exact else None, samples, rate)


def _mpeg_frame(data: bytes, place: int) -> tuple[int, int, int] | None:
    """Returns bytes, samples and sampling rate of the frame at `place`, or None when none is there."""
    head = int.from_bytes(data[place : place + 4], "big")
    version, layer, code, rate = head >> 19 & 3, 4 - (head >> 17 & 3), head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer == 4 or code in (0, 15) or rate == 3:
        return None
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _KILOBITS[version == 3, layer][code - 1]
    padded = head >> 9 & 1
    if layer == 1:
        return (12 * bits // hertz + padded) * 4, 384, hertz
    block = 576 if layer == 3 and version != 3 else 1152
    return block // 8 * bits // hertz + padded, block, hertz


def _mpeg_header(data: bytes, block: int) -> tuple[int, int | None, int]:
    """Returns the frames that the header in the first frame counts (0: none does), and the encoder's delay and padding
    if
    known.
    """
    mono, first = data[3] >> 6 == 3, data[1] >> 3 & 3 == 3
    place = 4 + ((17 if mono else 32) if first else (9 if mono else 17))
    if data[36:40] == b"VBRI":
        return int.from_bytes(data[50:54], "big"), None, 0
    if data[place : place + 4] not in (b"Xing", b"Info"):
        return 0, None, 0
    flags = data[place + 7]
    if not flags & 1:
        return 0, None, 0
    frames = int.from_bytes(data[place + 8 : place + 12], "big")
    place += 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    if data[place : place + 4] not in (b"LAME", b"Lavf", b"Lavc"):
        return frames, None, 0
    both = int.from_bytes(data[place + 21 : place + 24], "big")
    return frames, both >> 12, both & 0xFFF


def _mpeg_frames(data: bytes, block: int, rate: int) -> int:
    """Counts frames one right after the other from the first to the last byte, tags behind left out; 0 if anything else
    is.
    """
    place = frames = 0
    while place < len(data):
        found = _mpeg_frame(data, place)
        if found is None or found[1:] != (block, rate):
            return frames if _only_tags(data[place:]) else 0
        place += found[0]
        frames += 1
    return frames if place == len(data) else 0


def _only_tags(rest: bytes) -> bool:
    """Tells whether nothing but an APE tag, an ID3v1 tag or both stand behind the last frame."""
    if rest[:8] == b"APETAGEX" and len(rest) >= 32:
        rest = rest[32 + int.from_bytes(rest[12:16], "little") :]
        return not rest or _only_tags(rest)
    return rest[:3] == b"TAG" and len(rest) == 128


# Ogg Opus


def ogg_promise(file: BufferedIOBase, size: int) -> Promise:
    """Counts an Ogg file with one Opus stream from 0 to an end mark; anything else is known by decoding alone.

    FFmpeg leaves out pages whose checksum is wrong, and says nothing: they are counted here.
    """
    if size > _WALKED:
        return Promise()
    file.seek(0)
    data = file.read()
    if damaged := _damaged_pages(data):
        return Promise(damaged=damaged)
    place = number = total = granule = flags = 0
    serial, begun, packets, early, channels = data[14:18], b"", 0, 0, 0
    while place < len(data):
        head = data[place : place + 27]
        next_one = b"OggS\0", serial, number.to_bytes(4, "little")
        if len(head) < 27 or (head[:5], head[14:18], head[18:22]) != next_one:
            return Promise()
        flags, (granule,) = head[5], struct.unpack("<q", head[6:14])
        lacing = data[place + 27 : place + 27 + head[26]]
        place += 27 + head[26]
        for length in lacing:
            if len(begun) < 19:
                begun += data[place : place + min(length, 19)]
            place += length
            if length == 255:
                continue
            if packets == 0 and begun[:8] != b"OpusHead":
                return Promise()
            if packets == 0:
                early, channels = int.from_bytes(begun[10:12], "little"), begun[9]
            total += _opus_samples(begun) if packets > 1 else 0
            packets, begun = packets + 1, b""
        if packets < 3 and granule not in (0, -1):
            return Promise()
        # Where the first page's clock is not what its packets add up to, the stream was cut out of another.
        if packets > 2 and granule != total and not flags & 4:
            return Promise()
        number += 1
    if not flags & 4 or place != len(data) or granule < 0 or total == 0:
        return Promise()
    return Promise(max(0, min(total, granule) - early), 0, 48000, channels)


def _damaged_pages(data: bytes) -> int:
    """Returns the whole pages whose bytes are not those of their checksum."""
    place = damaged = 0
    while (place := data.find(b"OggS\0", place)) >= 0:
        count = data[place + 26] if place + 27 <= len(data) else 0
        end = place + 27 + count + sum(data[place + 27 : place + 27 + count])
        if end > len(data) or not count:
            place += 5
            continue
        page = data[place : place + 22] + bytes(4) + data[place + 26 : end]
        wrong = _ogg_checksum(page) != int.from_bytes(data[place + 22 : place + 26], "little")
        damaged += wrong
        place = place + 5 if wrong else end  # the length of a damaged page may be wrong as well
    return damaged


_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """Computes the checksum by zlib's CRC: the same polynomial, with the bits of everything in the other order and
    inverted.
    """
    found = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{found:032b}"[::-1], 2)


def _opus_samples(packet: bytes) -> int:
    """Tells how long a packet is, at 48 kHz."""
    if not packet or (packet[0] & 3 == 3 and len(packet) < 2):
        return 0
    code, count = packet[0] >> 3, (1, 2, 2, packet[1] & 63 if packet[0] & 3 == 3 else 0)[packet[0] & 3]
    if code < 12:
        return count * (480, 960, 1920, 2880)[code & 3]
    return count * ((480, 960)[code & 1] if code < 16 else (120, 240, 480, 960)[code & 3])


# Whether a video is whole


def check_boxes(file: BufferedIOBase, size: int) -> None:
    """Raises ValueError when a box of an MP4 or QuickTime file goes on past the file's end."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        length, name = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        # 0: the box goes to the end. What is not named like a box is no box, but something behind the last.
        if length < 8 or not name.isalnum():
            return
        place += length
    if place > size:
        raise ValueError(f"the file is truncated: {size} of {place} bytes")


def check_segment(file: BufferedIOBase, size: int) -> bool:
    """Tells whether a Matroska or WebM file says how large its segment is, and holds all of it.

    Raises ValueError when the segment goes on past the file's end.
    """
    file.seek(4)
    place = 4
    for name in (b"", b"\x18\x53\x80\x67"):
        if file.read(len(name)) != name:
            return False
        first = file.read(1)
        more = 8 - first[0].bit_length() if first and first[0] else 8
        rest = file.read(min(more, 7))
        if more > 7 or len(rest) < more:
            return False
        length = int.from_bytes(bytes([first[0] & (1 << 7 - more) - 1]) + rest, "big")
        place += len(name) + 1 + more
        known = length not in (0, (1 << 7 * (more + 1)) - 1)
        if name and known and place + length > size:
            raise ValueError(f"the file is truncated: {size} of {place + length} bytes")
        place = min(place + length, size)
        file.seek(place)
    return known
