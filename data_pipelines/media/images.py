"""Still images: their size from the header, their pixels in RGB.

`ImagesConfig` says how: upright, over white, scaled to 8 bits and in sRGB, as a person sees them, or as the released
processor takes them. Size and pixels follow the same settings.
"""

import hashlib
import importlib
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from baichuan_omni_jax.config import ImagesConfig
from data_pipelines.errors import SampleError
from data_pipelines.media.containers import check_bytes, check_pixels
from data_pipelines.media.location import Media, UnknownFormatError, reading
from data_pipelines.media.pixels import SIGNATURE, Png, read_png, to_rgb

MIN_PIXELS = 256  # an image of this area or less is refused at loading, before any resizing
MAX_ASPECT = 200
# Pillow also knows formats that run other programs (EPS); these only hold pixels. MPO comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SEEN = ImagesConfig()
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_JPEG_END = b"\xff\xd9"
_ORIENTATION = 0x0112  # EXIF and TIFF tag
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags: what an IFD is of the image, further IFDs inside it, DNG's version.
_REDUCED, _SUB_IFDS, _DNG = 254, 330, 50706


@dataclass(frozen=True)
class _Opened:
    """An image with its header read; `png` is its file where it is a PNG."""

    image: Image.Image
    png: Png | None

    @property
    def orientation(self) -> int:
        """How the pixels are turned still, 1 to 8. Pillow turns TIFFs by itself, and HEIF and AVIF say it otherwise."""
        if self.image.format in ("TIFF", "HEIF"):
            return 1
        found = Image.Exif()
        try:
            found.load(self.png.exif if self.png else self.image.info.get("exif") or b"")
            value = found.get(_ORIENTATION)
        except Exception:  # damaged EXIF: Pillow raises nearly anything, and images are shown without it
            return 1
        return value if value in _TRANSPOSED else 1

    def size(self, settings: ImagesConfig) -> tuple[int, int]:
        """Returns (height, width) of the pixels that `load_image` gives."""
        height, width = self.image.height, self.image.width
        return (width, height) if settings.orientation == "seen" and self.orientation >= 5 else (height, width)


def probe_image(media: Media, settings: ImagesConfig = SEEN) -> tuple[int, int]:
    """Reads (height, width) in pixels from the header.

    Raises SampleError: "unreadable_media" for a file that is no image, or too small or narrow (`check_size`);
    "too_big_media" beyond `limits`.
    """
    with _opened(media, pixels=False) as opened:
        return opened.size(settings)


def decode_image(media: Media, settings: ImagesConfig = SEEN) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes RGB pixels, of the size that `probe_image` tells; an animation gives its first frame.

    Raises SampleError as `probe_image`, and "unreadable_media" when the file ends early or holds values without a
    color.
    """
    return np.asarray(load_image(media, settings))


def load_image(media: Media, settings: ImagesConfig = SEEN) -> Image.Image:
    """Returns `decode_image` in Pillow's form, which it resizes without copying it to an array first."""
    with _opened(media) as opened:
        turned = opened.orientation if settings.orientation == "seen" else 1
        image = to_rgb(opened.image, opened.png, lambda: _again(media), settings)
        return image.transpose(_TRANSPOSED[turned]) if turned > 1 else image


@contextmanager
def _again(media: Media) -> Iterator[Image.Image]:
    with _opened(media) as opened:
        yield opened.image


@contextmanager
def _opened(media: Media, pixels: bool = True) -> Iterator[_Opened]:
    """Yields the image, its header read and its size in bytes and pixels accepted; without `pixels` they cannot be
    loaded.
    """
    # What Pillow warns of is either told by an error or of no account; the log is for what is skipped.
    with reading(media, "image"), warnings.catch_warnings(action="ignore"):
        check_bytes(media.size, "image", media.name)
        with media.open() as file:
            head = file.read(len(SIGNATURE))
            file.seek(0)
            # PNG files are cut down to the chunks that make pixels; whole JPEG pixels get their missing end mark.
            png = read_png(file, pixels) if head == SIGNATURE else None
            if pixels and head[:3] == b"\xff\xd8\xff":
                file = _with_end_mark(file, media.name)
            with _open_header(png.stream if png else file, media.name) as image:
                check_pixels(image.height, image.width, media.name)
                check_size(image.height, image.width, media.name)
                _check_preview(image)
                yield _Opened(image, png)


def _with_end_mark(file: io.BufferedIOBase, name: str) -> io.BufferedIOBase:
    """Returns the JPEG in `file`, with the mark behind its pixels that webcams leave out, where only that is missing.

    What stands behind whole pixels changes none of them; where they are cut it is taken for the rest, and does.
    """
    # Four different continuations: where all give the same pixels, none is missing.
    data = file.read()
    file.seek(0)
    if data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda"):  # the end mark, and that of the last scan's beginning
        return file
    with _open_header(io.BytesIO(data), name) as image:
        check_pixels(image.height, image.width, name)
    data, seen = data.removesuffix(b"\xff"), set()
    for rest in (b"\x00", b"\x55", b"\xaa", b"\x9c"):
        with Image.open(io.BytesIO(data + 256 * rest + _JPEG_END), formats=("JPEG",)) as image:
            seen.add(hashlib.sha256(image.tobytes()).digest())
        if len(seen) > 1:
            return file
    return io.BytesIO(data + _JPEG_END)


def _open_header(file: io.BufferedIOBase, name: str) -> AbstractContextManager[Image.Image]:
    formats = FORMATS
    if _is_heif(file):
        _load_heif()
        formats = ("HEIF",)
    try:
        return Image.open(cast(IO[bytes], file), formats=formats)
    except Image.DecompressionBombError as error:
        raise SampleError("too_big_media", f"{name} is too large an image: {error}") from error
    except UnidentifiedImageError as error:  # its own text shows the object that was read from
        if described := _describe_tiff(file):
            raise ValueError(described) from error
        raise UnknownFormatError(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from error


def _is_heif(file: io.BufferedIOBase) -> bool:
    """Tells whether the file is HEIF and not AVIF, which shares the container: by its brand and those it is compatible
    to.
    """
    head = file.read(64)
    file.seek(0)
    size = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[8:12], *(head[place : place + 4] for place in range(16, size - 3, 4))]
    return head[4:8] == b"ftyp" and brands[0] in _HEIF_BRANDS and not {b"avif", b"avis"} & set(brands)


def _load_heif() -> None:
    try:
        importlib.import_module("pillow_heif").register_heif_opener(thumbnails=False)
    except ImportError as error:
        raise ValueError(
            "it is HEIC (HEIF), which is read with the extra heif: pip install 'baichuan_omni_jax[heif]'"
        ) from error


def _check_preview(image: Image.Image) -> None:
    """Refuses raw images: cameras write them as TIFFs whose first image is a small preview of the real one."""
    tags = getattr(image, "tag_v2", {})
    reduced = tags.get(_REDUCED, 0)
    if _DNG in tags or (isinstance(reduced, int) and reduced & 1 and _SUB_IFDS in tags):
        raise ValueError("it is a raw image of a camera (DNG, NEF, ARW and the like), which is not read")


def _describe_tiff(file: io.BufferedIOBase) -> str:
    """Returns what a TIFF holds that Pillow has no mode for; nothing where the file is none, or is damaged."""
    try:
        file.seek(0)
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(cast(IO[bytes], file))
        bits, formats = tags[258], tags.get(339, (1,))
        kind = {1: "unsigned", 2: "signed", 3: "floating point"}.get(formats[0], f"format {formats[0]}")
        samples = tags.get(277, len(bits))
        return (
            f"it is a TIFF of {samples} samples of {bits[0]} bits ({kind}), which is not read, or its header is damaged"
        )
    except (SyntaxError, OSError, ValueError, TypeError, LookupError, struct.error):
        return ""


def check_size(height: int, width: int, name: str) -> None:
    """Raises SampleError("unreadable_media") for sides that are no image: too small or too narrow."""
    if height * width <= MIN_PIXELS:
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: at most {MIN_PIXELS} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: its aspect ratio exceeds {MAX_ASPECT}")
