"""From pixels as a file stores them to 8-bit sRGB as a person sees them: PNG chunks, depth, profile, transparency.

PNG. Files are cut down to the chunks that make the pixels, with what the others say of them. Pillow refuses an image
whose texts or profile unpack to more than a mebibyte, though none of them is needed to show it. Here texts are passed
over unread, so that no bomb among them is ever unpacked, and the profile is bounded.

Depth. White is the largest number that the file's own depth can hold: PGM's and PPM's maximum, TIFF's bits of a sample
or its largest sample value, PNG's significant bits (of samples stored without being scaled up, as scanners write
them). Where the file says no more than 16 or 32 bits, it is the least of 8, 10, 12, 14, 16, 24 and 32 bits that holds
the image's largest value: a 12-bit radiograph in 16 bits is not black. Floats are white at 1, or at the least power of
two that holds it. Where values are negative, white is the least power of two that holds the largest magnitude, and
black is as far below 0.
"""

import io
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image, ImageCms, ImageFile

from baichuan_omni_jax.config import ImagesConfig

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 1 << 24  # bytes of an ICC profile: above it the image is read without
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
        """What the transparent color of a gray image is multiplied by to be one of the 8-bit levels it is read as."""
        return 255 // (2**self.bits - 1) if self.bits in (2, 4) else 1


def read_png(file: io.BufferedIOBase, pixels: bool) -> Png:
    """Reads the PNG at the beginning of `file`; without `pixels` the stream ends where they begin, enough for a
    header.

    What is cut off stays cut off, and checksums stay as they are: whoever decodes the stream finds both. Raises
    ValueError for a file that is not made of a bounded number of chunks, or of Apple's own kind.
    """
    file.seek(0, io.SEEK_END)
    end = file.tell()
    file.seek(len(SIGNATURE))
    # Chunks of pixels are kept, a few notes are read, everything else is passed over.
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
    """Unpacks the profile of an iCCP chunk: a name, a zero, a zero for zlib, then the packed profile; empty when
    damaged.
    """
    _, _, packed = chunk.partition(b"\x00")
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], MAX_PROFILE) if packed[:1] == b"\x00" else b""
    except zlib.error:
        return b""
    return profile if unpacker.eof else b""


DEPTHS = (8, 10, 12, 14, 16, 24, 32)
_IDENTITY = 2  # levels: a profile that moves no color by more is sRGB under another name
# TIFF tags.
_BITS, _PHOTOMETRIC, _LARGEST, _PLANES, _FORMAT, _BLACK, _WHITE = 258, 262, 281, 284, 339, 340, 341
_DEEP_COLORS = re.compile(r"(RGB|RGBA|RGBX|CMYK|LA);16([BLN])")

Reopen = Callable[[], AbstractContextManager[Image.Image]]


def to_rgb(image: Image.Image, png: Png | None, reopen: Reopen, settings: ImagesConfig) -> Image.Image:
    """Converts an opened image to 8-bit RGB, not yet turned.

    Args:
        image: opened by Pillow, its pixels not loaded yet.
        png: its file, if it is a PNG.
        reopen: opens it once more: colors of 16 bits are decoded twice.
        settings: whether depth, transparency and profile are taken as a person sees them or as released.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: values that are no colors; and what Pillow raises on damaged pixels.
    """
    if (settings.depth, settings.alpha, settings.profile) == ("released",) * 3:
        return image.convert("RGB")
    # Pillow holds more than 8 bits in modes of one channel, or drops the rest of them on the way.
    profile = png.profile if png else image.info.get("icc_profile") or b""
    if settings.depth == "seen":
        image = _in_eight_bits(image, png, reopen)
    elif image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    # Profiles speak of colors alone: transparency is set aside until they are in sRGB.
    alpha = _alpha(image, png) if settings.alpha == "seen" else None
    color = _colors(image)
    if settings.profile == "seen" and (profile or color.mode == "LAB"):
        color = _to_srgb(color, profile)
    color = color.convert("RGB")
    return color if alpha is None else Image.composite(color, Image.new("RGB", color.size, "white"), alpha)


def full_scale(largest: int, declared: int, stored: int) -> int:
    """Returns the value that is white: of `declared` bits where they hold the `largest` value, else of the `stored`
    ones.

    With nothing declared (0), of the least of `DEPTHS` that holds it.

    >>> full_scale(4000, 0, 16), full_scale(4000, 14, 16), full_scale(60000, 12, 16)
    (4095, 16383, 65535)
    """
    if declared:
        return 2 ** (declared if largest < 2**declared else stored) - 1
    return next(2**bits - 1 for bits in DEPTHS if largest < 2**bits)


def _in_eight_bits(image: Image.Image, png: Png | None, reopen: Reopen) -> Image.Image:
    """Returns the image with 8 bits a channel; one that has them already as it is."""
    if image.mode == "F":
        return _scale_floats(image)
    if image.mode.startswith("I"):
        return _scale_grays(image, png)
    if _tag(image, _PLANES) == 2 and _tag(image, _BITS) == 16:  # Pillow takes the halves of such values for pixels
        raise ValueError("its channels of 16 bits lie in planes of their own, which is not read")
    raw = {_raw_mode(tile) for tile in _tiles(image)}
    if len(raw) == 1 and (found := _DEEP_COLORS.fullmatch(raw.pop())):
        return _scale_colors(image, found[1], found[2], png, reopen)
    return image


def _tiles(image: Image.Image) -> list[ImageFile._Tile]:
    """Finds where and how the pixels lie in the file; nothing for an image that comes from none."""
    return getattr(image, "tile", [])


def _raw_mode(tile: ImageFile._Tile) -> str:
    """Tells how the pixels of a tile lie in the file. Pillow's own decoder of PPM scales 16 bits down by itself."""
    args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    first = args[0] if args else tile.args
    if tile.codec_name == "ppm" and args[0] == "RGB" and len(args) > 1 and args[1] > 255:
        return "RGB;16B"
    return str(first)


def _tag(image: Image.Image, number: int) -> int | float:
    """Returns a number that a TIFF says of its first channel; 0 where it says nothing, or is no TIFF."""
    value = getattr(image, "tag_v2", {}).get(number, 0)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int | float) else 0


def _declared_bits(image: Image.Image, png: Png | None) -> int:
    """Bits that the file says its values have where it stores 16 or 32; 0: it does not say."""
    if png:
        return png.significant
    bits, largest = int(_tag(image, _BITS)), max(_tag(image, _LARGEST), _tag(image, _WHITE))
    if bits not in (0, 8, 16, 32):
        return bits
    return next((depth for depth in DEPTHS if 0 < largest < 2**depth), 0)


def _ppm_maximum(image: Image.Image) -> int:
    """Returns the white that a PGM or PPM declares, unless that is the largest of 16 bits: then it says nothing."""
    tiles = _tiles(image)
    if image.format != "PPM" or not tiles or not isinstance(args := tiles[0].args, tuple):
        return 0
    maximum = args[1] if len(args) > 1 else 0
    return maximum if 255 < maximum < 65535 else 0


def _scale_grays(image: Image.Image, png: Png | None) -> Image.Image:
    """Scales gray of 16 or 32 bits, with its transparent value if it has one."""
    maximum, declared = _ppm_maximum(image), _declared_bits(image, png)
    values, inverted = np.asarray(image), _is_inverted(image)
    if image.mode == "I" and _tag(image, _FORMAT) in (0, 1) and _tag(image, _BITS) == 32:
        values = values.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    gray = _levels(values, declared, 32 if values.itemsize == 4 and not maximum else 16, 65535 if maximum else 0)
    gray = 255 - gray if inverted else gray
    key = image.info.get("transparency")
    if isinstance(key, int):
        return Image.fromarray(np.stack([gray, _opaque(values != key)], -1), "LA")
    return Image.fromarray(gray)


def _levels(values: Integer[np.ndarray, "..."], declared: int, stored: int, white: int = 0) -> UInt8[np.ndarray, "..."]:
    """Scales whole numbers to levels of 8 bits; `white` where it is known already."""
    lowest, largest = int(values.min()), int(values.max())
    # Signed values lie around the middle gray.
    if lowest < 0:
        half = 2 ** max(7, max(-lowest - 1, largest).bit_length())
        return np.rint((values.astype(np.float64) + half) * (255 / (2 * half - 1))).astype(np.uint8)
    white = white or full_scale(largest, declared, stored)
    if white < 2**16:
        return ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)[values]
    return np.rint(values * (255 / white)).astype(np.uint8)


def _scale_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers (NaN or infinite)")
    low, high = float(_tag(image, _BLACK)), float(_tag(image, _WHITE))
    if not (np.isfinite([low, high]).all() and low < high):
        largest = max(1.0, float(np.abs(values).max()))
        high = 2.0 ** np.ceil(np.log2(largest))
        high = high - 1 if 255 <= largest <= high - 1 else high
        low = -high if values.min() < 0 else 0.0
    gray = np.rint(np.clip((values - np.float64(low)) / (high - low), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(255 - gray if _is_inverted(image) else gray)


def _is_inverted(image: Image.Image) -> bool:
    """Tells whether 0 is white, which Pillow heeds in TIFFs of up to 8 bits alone."""
    return image.format == "TIFF" and _PHOTOMETRIC in getattr(image, "tag_v2", {}) and _tag(image, _PHOTOMETRIC) == 0


def _scale_colors(image: Image.Image, channels: str, order: str, png: Png | None, reopen: Reopen) -> Image.Image:
    """Scales colors of 16 bits a channel: Pillow decodes the upper bytes, and as if the order were the other one the
    lower.
    """
    declared, maximum, key = _declared_bits(image, png), _ppm_maximum(image), image.info.get("transparency")
    if channels == "LA":
        values = _decode_as(image, "RGBA").astype(np.uint16)
        values = values[..., 0::2] << 8 | values[..., 1::2]
    else:
        upper = _decode_as(image, f"{channels};16{order}").astype(np.uint16) << 8
        with reopen() as other:
            opposite = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[order]
            values = upper | _decode_as(other, f"{channels};16{opposite}")
    # Colors and transparency are scaled apart: each has a largest value of its own.
    count = {"LA": 1, "CMYK": 4}.get(channels, 3)
    color, alpha = values[..., :count], values[..., count:]
    white = maximum or full_scale(int(color.max()), declared, 16)
    layers = [_levels(np.minimum(color, white), 0, 16, white)]
    if alpha.size:
        layers.append(_levels(alpha, 0, 16, white if alpha.max() <= white else 65535))
    elif isinstance(key, tuple):
        layers.append(_opaque((color != np.array(key)).any(-1, keepdims=True)))
    pixels = np.concatenate(layers, -1)
    mode = "CMYK" if channels == "CMYK" else {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())


def _decode_as(image: Image.Image, raw: str) -> UInt8[np.ndarray, "h w c"]:
    """Returns the pixels when their bytes are taken for those of another raw mode of the same size."""

    def taken(tile: ImageFile._Tile) -> ImageFile._Tile:
        if tile.codec_name == "ppm":
            return tile._replace(codec_name="raw", args=raw)
        return tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)

    cast("ImageFile.ImageFile", image).tile = [taken(tile) for tile in _tiles(image)]
    image.load()
    return np.asarray(image)


def _opaque(shown: Bool[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return shown.astype(np.uint8) * 255


def _alpha(image: Image.Image, png: Png | None) -> Image.Image | None:
    """Tells how opaque each pixel of an 8-bit image is; None when all are."""
    key = image.info.get("transparency")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa"):
        alpha = image.getchannel(len(image.getbands()) - 1)
    elif image.mode == "P" and key is not None:
        alpha = image.convert("RGBA").getchannel("A")
    elif image.mode in ("L", "1") and isinstance(key, int):
        alpha = Image.fromarray(_opaque(np.asarray(image.convert("L")) != key * (png.key_scale if png else 1)))
    elif image.mode == "RGB" and isinstance(key, tuple):
        alpha = Image.fromarray(_opaque((np.asarray(image) != np.array(key)).any(-1)))
    else:
        return None
    return None if alpha.getextrema()[0] == 255 else alpha


def _colors(image: Image.Image) -> Image.Image:
    """Returns the colors without transparency, in a mode that profiles know."""
    if image.mode in ("La", "RGBa"):  # colors that are multiplied by it already
        image = image.convert(image.mode.upper())
    if image.mode in ("L", "LA"):
        return image.getchannel(0)
    return image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB")


def _to_srgb(color: Image.Image, profile: bytes) -> Image.Image:
    """Converts by the ICC profile; unchanged when that is damaged, or of another kind of colors than the image's."""
    mode, transform = _transform(profile if color.mode != "LAB" else b"", color.mode)
    if transform is None:
        return color
    try:
        return ImageCms.applyTransform(color.convert(mode), transform) or color
    except (ImageCms.PyCMSError, OSError, ValueError):
        return color


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Returns the mode that an image is to be in, and the way from there to sRGB; None when there is nothing to do."""
    kinds = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        kind = kinds.get(cast(Any, source.profile).xcolor_space.strip(), "")
        # Gray images often bring the profile of the colors that they were made from.
        if kind != mode and (kind, mode) != ("RGB", "L"):
            return mode, None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), kind, "RGB")
        return kind, None if kind in ("RGB", "L") and _is_identity(transform, kind) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return mode, None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    steps = np.linspace(0, 255, 16 if mode == "RGB" else 256).astype(np.uint8)
    axes = np.meshgrid(*[steps] * (3 if mode == "RGB" else 1), indexing="ij")
    probe = Image.fromarray(np.stack(axes, -1).reshape(1, -1, len(axes)).squeeze(-1 if len(axes) == 1 else ()))
    moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return bool(np.abs(moved - np.asarray(probe.convert("RGB"))).max() <= _IDENTITY)
