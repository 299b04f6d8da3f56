"""PNG files cut down to the chunks that make the pixels, with what the others say of them.

Pillow refuses a picture whose texts or profile unpack to more than a mebibyte, though none of them is needed to show
it. Here texts are passed over unread, so that no bomb among them is ever unpacked, and the profile is bounded.
"""

import io
import zlib
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 1 << 24  # bytes of an ICC profile: above it the picture is read without
_MAX_CHUNKS = 1 << 19  # of one file: 256 MiB of pixels in the usual pieces are 32,768
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MAX_NOTE = 1 << 24  # bytes of a chunk that is read beside the pixels


@dataclass(frozen=True)
class Png:
    """`stream` holds the pixels' chunks alone. Of the others: `significant` bits of the colors (sBIT; 0: not told),
    `exif` and the ICC `profile` (empty: there is none). `bits` are those of a sample as it is stored.
    """

    stream: io.BytesIO
    bits: int = 8
    significant: int = 0
    exif: bytes = b""
    profile: bytes = b""

    @property
    def key_scale(self) -> int:
        """What the transparent color of a gray picture is multiplied by to be one of the 8-bit levels it is read as."""
        return 255 // (2**self.bits - 1) if self.bits in (2, 4) else 1


def read_png(file: io.BufferedIOBase, pixels: bool) -> Png:
    """The PNG at the beginning of `file`; without `pixels` the stream ends where they begin, enough for a header.

    What is cut off stays cut off, and checksums stay as they are: whoever decodes the stream finds both. Raises
    ValueError for a file that is not made of a bounded number of chunks, or of Apple's own kind.
    """
    file.seek(0, io.SEEK_END)
    end = file.tell()
    file.seek(len(SIGNATURE))
    kept, notes, color = [SIGNATURE], {}, b""
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        after = file.tell() + size + 4
        if kind in (b"sBIT", b"eXIf", b"iCCP") and kind not in notes and size <= _MAX_NOTE:
            notes[kind] = file.read(size)
        elif kind == b"CgBI":
            raise ValueError("it is a PNG of Apple's own kind (CgBI), which only its devices read")
        elif kind == b"IDAT" and not pixels:
            # Pillow reads no further than this; what lies behind the pixels may still say how they are turned.
            kept += [] if b"IDAT" in notes else [head]
            notes[b"IDAT"] = b""
        elif kind in _PIXELS:
            kept += [head, chunk := file.read(size + 4)]
            color = chunk[8:10] if kind == b"IHDR" else color
        if kind == b"IEND" or len(head) < 8 or after > end or not kind.isalpha():
            break
        file.seek(after)
    else:
        raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")
    bits = color[0] if color else 8
    significant = max(notes.get(b"sBIT", b"\x00")[: 3 if color[1:] in (b"\x02", b"\x06") else 1], default=0)
    return Png(
        io.BytesIO(b"".join(kept)),
        bits,
        significant if significant <= bits else 0,
        notes.get(b"eXIf", b""),
        _unpack_profile(notes.get(b"iCCP", b"")),
    )


def _unpack_profile(chunk: bytes) -> bytes:
    """The profile of an iCCP chunk: a name, a zero, a zero for zlib, then the packed profile; empty when damaged."""
    _, _, packed = chunk.partition(b"\x00")
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], MAX_PROFILE) if packed[:1] == b"\x00" else b""
    except zlib.error:
        return b""
    return profile if unpacker.eof else b""
