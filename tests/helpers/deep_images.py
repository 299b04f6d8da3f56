"""Files that Pillow reads but does not write, made by hand from their formats' definitions."""

import struct
import zlib
from pathlib import Path

import numpy as np

from data_pipelines.media.images import decode_image, probe_image
from tests.helpers.small_media import media

RAMP = np.linspace(0, 65535, 30 * 20).round().astype(np.uint16).reshape(20, 30)  # a gray ramp of 16 bits


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(values: np.ndarray, *before: bytes, after: bytes = b"", bits: int = 0) -> bytes:
    """(h, w) or (h, w, 1 to 4) as a PNG of 8 or 16 bits, or of `bits` < 8 a gray; further chunks around the pixels."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape
    if bits:
        digits = np.unpackbits(values.astype(np.uint8), axis=-1)[..., 8 - bits :].reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in digits]
    else:
        rows = [row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values]
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, bits or 8 * values.itemsize, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\x00" + row for row in rows))
    chunks = (chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_bytes(values: np.ndarray, order: str = "<", packed: bool = False, **tags: int) -> bytes:
    """(h, w) or (h, w, channels) as a TIFF of one strip in the byte order `order`; `packed` with Deflate.

    `tags` by their numbers, as `t262=0`; whole numbers are written as LONG.
    """
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(strip) if packed else strip
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    fields = {256: width, 257: height, 258: 8 * values.itemsize, 259: 8 if packed else 1, 262: 2 if channels > 2 else 1}
    fields |= {273: 8, 277: channels, 278: height, 279: len(strip), 339: kind}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    place = 8 + len(strip) + len(strip) % 2
    lists = place + 2 + 12 * len(fields) + 4
    entries, behind = b"", b""
    for number, value in sorted(fields.items()):
        if number in (258, 339) and channels > 1:  # of each channel
            entries += struct.pack(order + "HHII", number, 3, channels, lists + len(behind))
            behind += struct.pack(f"{order}{channels}H", *[value] * channels)
        elif isinstance(value, float):
            entries += struct.pack(order + "HHIf", number, 11, 1, value)
        else:
            entries += struct.pack(order + "HHII", number, 4, 1, value)
    head = (b"II*\x00" if order == "<" else b"MM\x00*") + struct.pack(order + "I", place)
    table = struct.pack(order + "H", len(fields)) + entries + struct.pack(order + "I", 0)
    return head + strip + b"\x00" * (len(strip) % 2) + table + behind


def profile_bytes(colorants: dict[str, tuple[float, float, float]], gamma: float, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of version 2 by its colorants in D50 and the power of its tone curves."""
    fixed = lambda value: round(value * 65536)  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))
    text = b"test\x00"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(79)}
    tags |= {b"cprt": b"text" + bytes(4) + text, b"wtpt": _xyz((0.9642, 1.0, 0.8249), fixed)}
    names = [b"kTRC"] if space == b"GRAY" else [name.encode() + b"TRC" for name in "rgb"]
    tags |= {name: curve for name in names}
    tags |= {name.encode() + b"XYZ": _xyz(value, fixed) for name, value in colorants.items()}
    place, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        value += b"\x00" * (-len(value) % 4)
        table += name + struct.pack(">II", place + len(data), len(value))
        data += value
    header = struct.pack(">I4sI", place + len(data), b"\x00" * 4, 0x02200000) + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + struct.pack(">3i", fixed(0.9642), fixed(1.0), fixed(0.8249))
    return header.ljust(128, b"\x00") + struct.pack(">I", len(tags)) + table + data


def _xyz(values: tuple[float, float, float], fixed) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *map(fixed, values))


def pixels_of(path: Path, data: bytes, *settings) -> np.ndarray:
    """The image of these bytes as it is read, its probed size checked."""
    path.write_bytes(data)
    pixels = decode_image(media(path), *settings)
    assert probe_image(media(path), *settings) == pixels.shape[:2]
    return pixels.astype(int)
