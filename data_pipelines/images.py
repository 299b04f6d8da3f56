"""Still images: their size from the header, their pixels.

EXIF orientation is ignored in both, as in the released processor.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.document import SampleError
from data_pipelines.media import Media, reading

MIN_PIXELS = 256  # an image of this area or less is refused at loading, before any resizing
MAX_ASPECT = 200
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
# Pillow also knows formats that run other programs (EPS); these only hold pixels.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF")


def probe_image(media: Media) -> tuple[int, int]:
    """(height, width) in pixels, from the header.

    Raises SampleError("unreadable_media") for a file that is no image, or whose size is refused (`check_size`).
    """
    with reading(media, "image"), media.open() as file, Image.open(file, formats=FORMATS) as image:
        width, height = image.size
    check_size(height, width, media.name)
    return height, width


def decode_image(media: Media) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels, of the size that `probe_image` tells; transparency is dropped, an animation gives its first frame.

    Raises SampleError("unreadable_media"), also when the file ends early.
    """
    with reading(media, "image"), media.open() as file, Image.open(file, formats=FORMATS) as image:
        check_size(image.height, image.width, media.name)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def check_size(height: int, width: int, name: str) -> None:
    """Raises SampleError("unreadable_media") for sides that are no picture: too small, too narrow, far too large."""
    if height * width <= MIN_PIXELS:
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: at most {MIN_PIXELS} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: its aspect ratio exceeds {MAX_ASPECT}")
    if height * width > MAX_PIXELS:
        raise SampleError("unreadable_media", f"{name} is {height}x{width}: more than {MAX_PIXELS} pixels")
