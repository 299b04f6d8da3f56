"""Still images: their size from the header, their pixels.

EXIF orientation is ignored in both, as in the released processor.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.document import SampleError
from data_pipelines.limits import check_bytes, check_pixels
from data_pipelines.media import Media, reading

MIN_PIXELS = 256  # an image of this area or less is refused at loading, before any resizing
MAX_ASPECT = 200
# Pillow also knows formats that run other programs (EPS); these only hold pixels. MPO comes with JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def probe_image(media: Media) -> tuple[int, int]:
    """(height, width) in pixels, from the header.

    Raises SampleError: "unreadable_media" for a file that is no image, or too small or narrow (`check_size`);
    "too_big_media" beyond `limits`.
    """
    with _opened(media) as image:
        return image.height, image.width


def decode_image(media: Media) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels, of the size that `probe_image` tells; transparency is dropped, an animation gives its first frame.

    Raises SampleError as `probe_image`, and "unreadable_media" when the file ends early.
    """
    return np.asarray(load_image(media))


def load_image(media: Media) -> Image.Image:
    """`decode_image` in Pillow's form, which it resizes without copying it to an array first."""
    with _opened(media) as image:
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


@contextmanager
def _opened(media: Media) -> Iterator[Image.Image]:
    """The image, its header read and its size in bytes and pixels accepted."""
    # What Pillow warns of is either told by an error or of no account; the log is for what is skipped.
    with reading(media, "image"), warnings.catch_warnings(action="ignore"):
        check_bytes(media.size, "image", media.name)
        with media.open() as file, _open_header(file, media.name) as image:
            check_pixels(image.height, image.width, media.name)
            check_size(image.height, image.width, media.name)
            yield image


def _open_header(file: io.BufferedIOBase, name: str) -> Image.Image:
    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError("too_big_media", f"{name} is too large an image: {error}") from error


def check_size(height: int, width: int, name: str) -> None:
    """Raises SampleError("unreadable_media") for sides that are no picture: too small or too narrow."""
    if height * width <= MIN_PIXELS:
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: at most {MIN_PIXELS} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: its aspect ratio exceeds {MAX_ASPECT}")
