"""Naming a file by its first bytes, and why a decoder gave it up, in words that hold no path and no Python object.

Decoders decide what can be read. This table only says what the file is when they refuse it.
"""

import re
import struct
from dataclasses import dataclass

HEAD = 512  # bytes that `kind_of` looks at: a tar archive is known by its bytes 257 to 262
_STILL, _AUDIO, _VIDEO = frozenset({"image"}), frozenset({"audio"}), frozenset({"audio", "video"})
_NO_MEDIA: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FileKind:
    """What a file is: "a PNG image". `read_as` names the kinds of media that files of this kind are read as."""

    name: str
    read_as: frozenset[str] = _NO_MEDIA


# (byte at which it stands, these bytes, what the file is): the first that fits, so the longer of two alike comes first.
_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    # Files that were never fetched, or are something else that lies beside media.
    (0, b"version https://git-lfs", FileKind("a pointer to a file in Git LFS, which was not fetched")),
    (0, b"/annex/objects/", FileKind("a pointer to a file in git-annex, which was not fetched")),
    (0, b"\x00\x05\x16\x07", FileKind("what macOS keeps beside a file (AppleDouble), not the file")),
    (0, b"L\x00\x00\x00\x01\x14\x02\x00", FileKind("a Windows shortcut")),
    # Archives, encrypted and compressed files.
    (0, b"PK\x03\x04", FileKind("a zip archive")),
    (0, b"PK\x05\x06", FileKind("a zip archive")),
    (0, b"Rar!", FileKind("a RAR archive")),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive")),
    (257, b"ustar", FileKind("a tar archive")),
    (0, b"\x1f\x8b", FileKind("a gzip file")),
    (0, b"\x28\xb5\x2f\xfd", FileKind("a zstd file")),
    (0, b"BZh", FileKind("a bzip2 file")),
    (0, b"\xfd7zXZ\x00", FileKind("an xz file")),
    (0, b"\x04\x22\x4d\x18", FileKind("an LZ4 file")),
    (0, b"Salted__", FileKind("an encrypted file")),
    (0, b"-----BEGIN PGP", FileKind("an encrypted file")),
    (0, b"age-encryption.org", FileKind("an encrypted file")),
    # Documents, tables and programs.
    (0, b"%PDF", FileKind("a PDF file")),
    (0, b"%!PS", FileKind("a PostScript file")),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileKind("an old Office file")),
    (0, b"{\\rtf", FileKind("an RTF file")),
    (0, b"PAR1", FileKind("a Parquet file")),
    (0, b"ARROW1", FileKind("an Arrow file")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file")),
    (0, b"SQLite format 3", FileKind("an SQLite file")),
    (0, b"\x93NUMPY", FileKind("a NumPy array")),
    (0, b"\x7fELF", FileKind("a program")),
    (0, b"MZ", FileKind("a program")),
    (0, b"#EXTM3U", FileKind("a play list")),
    (0, b"[playlist]", FileKind("a play list")),
    # Images.
    (0, b"\x89PNG\r\n\x1a\n", FileKind("a PNG image", _STILL)),
    (0, b"\xff\xd8\xff", FileKind("a JPEG image", _STILL)),
    (0, b"GIF8", FileKind("a GIF image", frozenset({"image", "video"}))),
    (8, b"CR\x02", FileKind("a raw image of a camera (CR2)")),
    (0, b"II*\x00", FileKind("a TIFF image", _STILL)),
    (0, b"MM\x00*", FileKind("a TIFF image", _STILL)),
    (0, b"II+\x00", FileKind("a BigTIFF image", _STILL)),
    (0, b"MM\x00+", FileKind("a BigTIFF image", _STILL)),
    (0, b"FUJIFILMCCD-RAW", FileKind("a raw image of a camera (RAF)")),
    (0, b"IIU\x00", FileKind("a raw image of a camera (RW2)")),
    (0, b"IIRO", FileKind("a raw image of a camera (ORF)")),
    (0, b"IIRS", FileKind("a raw image of a camera (ORF)")),
    (0, b"FOVb", FileKind("a raw image of a camera (X3F)")),
    (0, b"\xff\x0a", FileKind("a JPEG XL image")),
    (0, b"\x00\x00\x00\x0cJXL ", FileKind("a JPEG XL image")),
    (0, b"\x00\x00\x00\x0cjP  ", FileKind("a JPEG 2000 image")),
    (0, b"\xff\x4f\xff\x51", FileKind("a JPEG 2000 image")),
    (0, b"8BPS", FileKind("a Photoshop image")),
    (0, b"gimp xcf", FileKind("a GIMP image")),
    (0, b"\x00\x00\x01\x00", FileKind("an icon (ICO)")),
    (0, b"icns", FileKind("an icon (ICNS)")),
    (0, b"v/1\x01", FileKind("an OpenEXR image")),
    (0, b"#?RADIANCE", FileKind("a Radiance HDR image")),
    (0, b"qoif", FileKind("a QOI image")),
    (0, b"DDS ", FileKind("a DDS image")),
    (0, b"SIMPLE  =", FileKind("a FITS image")),
    (128, b"DICM", FileKind("a DICOM image")),
    (0, b"AT&TFORM", FileKind("a DjVu file")),
    (0, b"\xd7\xcd\xc6\x9a", FileKind("a WMF drawing")),
    # Audio.
    (0, b"fLaC", FileKind("a FLAC audio file", _AUDIO)),
    (0, b"OggS", FileKind("an Ogg file", _VIDEO)),
    (0, b"ID3", FileKind("an MP3 audio file", _AUDIO)),
    (0, b"RF64", FileKind("an RF64 audio file", _AUDIO)),
    (0, b"BW64", FileKind("a BW64 audio file", _AUDIO)),
    (0, b"riff\x2e\x91\xcf\x11", FileKind("a Wave64 audio file", _AUDIO)),
    (0, b".snd", FileKind("an AU audio file", _AUDIO)),
    (0, b"dns.", FileKind("an AU audio file of little-endian order")),
    (0, b"caff", FileKind("a CAF audio file", _AUDIO)),
    (0, b"NIST_1A", FileKind("a SPHERE audio file", _AUDIO)),
    (0, b"#!AMR", FileKind("an AMR audio file", _AUDIO)),
    (0, b"#!SILK", FileKind("a SILK audio file")),
    (1, b"#!SILK", FileKind("a SILK audio file")),
    (0, b"MThd", FileKind("a MIDI file, notes without audio")),
    (0, b"MAC ", FileKind("a Monkey's Audio file")),
    (0, b"wvpk", FileKind("a WavPack audio file")),
    (0, b"TTA1", FileKind("a True Audio file")),
    (0, b"MPCK", FileKind("a Musepack audio file")),
    (0, b"MP+", FileKind("a Musepack audio file")),
    (0, b"PVF", FileKind("a PVF audio file")),
    (0, b"\x64\xa3\x01\x00", FileKind("an IRCAM audio file")),
    (0, b"\x64\xa3\x02\x00", FileKind("an IRCAM audio file")),
    (0, b" paf", FileKind("a PARIS audio file")),
    (0, b"fap ", FileKind("a PARIS audio file")),
    (0, b"MATLAB 5.0", FileKind("a MATLAB file")),
    (0, b"Extended Instrument:", FileKind("an instrument of a tracker")),
    (0, b"\x0b\x77", FileKind("an AC-3 audio file")),
    (0, b"2BIT", FileKind("an AVR audio file")),
    (0, b"OFR ", FileKind("an OptimFROG audio file")),
    (0, b"ajkg", FileKind("a Shorten audio file")),
    (0, b"qoaf", FileKind("a QOA audio file")),
    (0, b"DSD ", FileKind("a DSD audio file")),
    (0, b"FRM8", FileKind("a DSD audio file")),
    (0, b"Creative Voice File", FileKind("a VOC audio file")),
    (0, b".ra\xfd", FileKind("a RealAudio file")),
    (0, b"Extended Module:", FileKind("a tracker module, notes without audio")),
    (0, b"IMPM", FileKind("a tracker module, notes without audio")),
    # Videos.
    (0, b"\x1a\x45\xdf\xa3", FileKind("a Matroska or WebM file", _VIDEO)),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", FileKind("a Windows Media file", _VIDEO)),
    (0, b"FLV\x01", FileKind("a Flash video", _VIDEO)),
    (0, b".RMF", FileKind("a RealMedia file")),
    (0, b"\x00\x00\x01\xba", FileKind("an MPEG program stream", _VIDEO)),
    (0, b"\x00\x00\x01\xb3", FileKind("an MPEG video stream", frozenset({"video"}))),
    (4, b"moov", FileKind("a QuickTime file", _VIDEO)),
    (4, b"mdat", FileKind("a QuickTime file", _VIDEO)),
    (0, b"FWS", FileKind("a Flash program")),
    (0, b"CWS", FileKind("a Flash program")),
)
# Files of chunks say at byte 8 what they hold; ISO media files name their brand there.
_RIFF = {
    b"WAVE": FileKind("a WAV audio file", _AUDIO),
    b"WEBP": FileKind("a WebP image", _STILL),
    b"AVI ": FileKind("an AVI video", _VIDEO),
    b"AIFF": FileKind("an AIFF audio file", _AUDIO),
    b"AIFC": FileKind("an AIFF audio file", _AUDIO),
    b"8SVX": FileKind("an IFF 8SVX audio file"),
    b"16SV": FileKind("an IFF 16SV audio file"),
    b"RMID": FileKind("a MIDI file, notes without audio"),
    b"sfbk": FileKind("a SoundFont, instruments without audio"),
}
_BRANDS = {
    b"avif": FileKind("an AVIF image", _STILL),
    b"avis": FileKind("an AVIF image", _STILL),
    b"crx ": FileKind("a raw image of a camera (CR3)"),
    b"M4A ": FileKind("an M4A audio file", _AUDIO),
    b"qt  ": FileKind("a QuickTime video", _VIDEO),
    b"jp2 ": FileKind("a JPEG 2000 image"),
} | {brand: FileKind("a HEIC image", _STILL) for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1")}


def kind_of(head: bytes) -> FileKind | None:
    """Returns what the file is whose first `HEAD` bytes (or all, of a smaller one) these are, where they tell.

    >>> kind_of(b"PK\\x03\\x04").name
    'a zip archive'
    """
    if not head:
        return FileKind("an empty file")
    for place, magic, kind in _MAGIC:
        if head.startswith(magic, place):
            return kind
    if head[:4] in (b"RIFF", b"FORM", b"RIFX"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], FileKind("an MP4 file", _VIDEO))
    if head[:1] == b"\x47" and head[188:189] == b"\x47":
        return FileKind("an MPEG transport stream", _VIDEO)
    if is_utf16(head):
        return FileKind("a text in UTF-16")
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return FileKind("an AAC audio file" if head[1] & 0x06 == 0 else "an MP3 audio file", _AUDIO)
    return _kind_of_text(head)


def is_utf16(head: bytes) -> bool:
    """Tells whether these bytes begin a text in UTF-16 or UTF-32: by its mark, or by the zeros of its first letters."""
    marked = head[:2] in (b"\xff\xfe", b"\xfe\xff")
    zeros = (head[0:4:2].count(0), head[1:4:2].count(0))
    return len(head) >= 4 and (sum(zeros) > 0 if marked else zeros in ((2, 0), (0, 2)))


def _kind_of_text(head: bytes) -> FileKind | None:
    """Names pages, drawings and plain words where media were expected; binary files of no known kind give nothing."""
    if head and not head.strip(b"\x00"):
        return FileKind("a file of zeros")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text and text.startswith(b"<"):
        return FileKind("an SVG drawing")
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<!--", b"<body")):
        return FileKind("a page of HTML")
    if text.startswith(b"<?xml"):
        return FileKind("a text of XML")
    if re.match(rb"p[1-7]\s", text):
        return FileKind("a Netpbm image", _STILL)
    if re.match(rb'[{\[]\s*["{\[\]}]', text):
        return FileKind("a text of JSON")
    # The last character may be cut.
    words = head.decode("utf-8", errors="ignore")
    if words and len(words.encode()) > len(head) - 4 and all(each.isprintable() or each.isspace() for each in words):
        return FileKind("a text")
    return None


_UNKNOWN = "its format is not known"
_DAMAGED = "its content is damaged"
# What decoders written in Python raise when a file's numbers lead them astray; the text is about their own code.
_LOST = (AttributeError, TypeError, LookupError, AssertionError, ArithmeticError, RecursionError, UnicodeError)
_OBJECT = re.compile(r"\s*<[^<>]*(?:\bat 0x[0-9a-fA-F]+|name=)[^<>]*(?:<[^<>]*>)?[^<>]*>|\bPosixPath\([^()]*\)")
_BYTES = re.compile(r"\bb(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")")
_PATH = re.compile(r"'/[^']*'|\"/[^\"]*\"|(?<![\w.<>/-])/[^\s'\":,;()]+/[^\s'\":,;()]*")


def plain_reason(error: BaseException) -> str:
    """Says why something failed, from what was raised, on one line: without Python objects, addresses and absolute
    paths.

    >>> plain_reason(FileNotFoundError(2, "No such file or directory", "/home/me/a.png"))
    'No such file or directory'
    """
    if type(error).__name__ == "UnidentifiedImageError":
        return _UNKNOWN
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if isinstance(error, (*_LOST, struct.error)):
        return _DAMAGED
    # FFmpeg keeps what its decoder said last beside its own word; libsndfile's word stands alone.
    told = getattr(error, "error_string", None) or getattr(error, "strerror", None)
    log = getattr(error, "log", None)
    if told and isinstance(log, tuple) and log and isinstance(log[-1], str):
        told = f"{told}: {log[-1]}"
    text = _PATH.sub("", _OBJECT.sub("", _BYTES.sub("", str(told or error))))
    text = re.sub(r"\s+", " ", text).strip(" .:;")
    return re.sub(r"\s+([:;,.])", r"\1", text.replace("()", "")).strip() or _DAMAGED
