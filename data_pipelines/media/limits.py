"""What one media file may be at most: refused as `too_big_media`, from its size and header, before anything is decoded.

They are far above what a row of 65536 tokens can use (it holds 87 minutes of sound), and bound what one file costs a
worker. Headers can lie, so decoders count along.
"""

from data_pipelines.errors import SampleError

MAX_BYTES = {"image": 2**28, "sound": 2**31, "video": 2**33}

MAX_PIXELS = 89_478_485  # of a still: above it Pillow suspects a decompression bomb
MAX_FRAME_PIXELS = 139_264 * 16**2  # of a video: the largest frame that H.264 knows (8192x4352)
MAX_AUDIO_SECONDS = 2 * 3600
MAX_AUDIO_SAMPLES = MAX_AUDIO_SECONDS * 48_000  # at the file's own rate
MAX_SAMPLING_RATE = 768_000
MAX_CHANNELS = 32
MAX_VIDEO_SECONDS = 24 * 3600
MAX_PACKETS = 10_000_000  # of a container without a table of contents, which is read through for its length
MAX_DECODED_PIXELS = 5 * 10**11  # of the frames between those that are wanted: two hours of 1920x1080 at 30 a second


def check_bytes(size: int, kind: str, name: str) -> None:
    """Raises SampleError("too_big_media") when a file of this kind (a key of MAX_BYTES) has too many bytes."""
    _check(size, MAX_BYTES[kind], name, f"bytes of one {kind}")


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises SampleError("too_big_media") when a still has too many pixels."""
    _check(height * width, MAX_PIXELS, name, f"pixels ({height}x{width})")


def check_audio(samples: int, rate: int, channels: int, name: str) -> None:
    """Raises SampleError("too_big_media") for a sound too long, with too many samples or channels, or too fine."""
    _check(samples / rate, MAX_AUDIO_SECONDS, name, "seconds of sound")
    _check(samples, MAX_AUDIO_SAMPLES, name, "samples of sound")
    _check(rate, MAX_SAMPLING_RATE, name, "samples a second")
    _check(channels, MAX_CHANNELS, name, "channels")


def check_video(height: int, width: int, seconds: float, name: str) -> None:
    """Raises SampleError("too_big_media") for a video whose frames are too large, or that is too long."""
    _check(height * width, MAX_FRAME_PIXELS, name, f"pixels a frame ({height}x{width})")
    _check(seconds, MAX_VIDEO_SECONDS, name, "seconds of video")


def check_packets(packets: int, name: str) -> None:
    """Raises SampleError("too_big_media") when a container was read through for too long."""
    _check(packets, MAX_PACKETS, name, "packets")


def check_decoded(pixels: int, name: str) -> None:
    """Raises SampleError("too_big_media") when too many pixels were decoded on the way to the frames wanted."""
    _check(pixels, MAX_DECODED_PIXELS, name, "pixels to decode")


def _check(found: int | float, limit: int, name: str, what: str) -> None:
    if found > limit:
        raise SampleError("too_big_media", f"{name} has {round(found)} {what}, more than {limit}")
