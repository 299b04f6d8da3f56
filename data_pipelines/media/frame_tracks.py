"""Video files that hold nothing but the frames a model takes: JPEG, each a key frame, at its time.

Such a file is read as any video is, and gives the same times and frames as the one it was made of, up to the loss of
JPEG; a frame costs one picture's decoding, not that of all frames since a key frame. It is a QuickTime file (MJPEG).
"""

import io
import re
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import SampleError
from data_pipelines.media.containers import MAX_VIDEO_SECONDS
from data_pipelines.media.location import Media
from data_pipelines.media.sparse_decoding import SLACK
from data_pipelines.media.videos import VideoProbe, probe_video, read_video

QUALITY = 95  # of JPEG, colors at half the resolution as nearly all videos have them
_CLOCK = 90_000  # ticks a second
_SPEC = re.compile(r"(\d+(?:\.\d+)?)fps(?::(\d+))?")


@dataclass(frozen=True)
class FrameSpec:
    """Which frames are kept of a video: `rate` a second; where that is more than `most` (0: no limit), so many spread
    evenly, as a model with that limit takes them.
    """

    rate: float
    most: int = 0

    @classmethod
    def parse(cls, text: str) -> "FrameSpec":
        """Reads "1fps" or "1fps:32". Raises ConfigError."""
        found = _SPEC.fullmatch(text)
        if found is None or not float(found[1]) or found[2] == "0":
            raise ConfigError(f"--frames {text} is no rate such as 1fps, or 1fps:32 for at most 32 frames of a video")
        return cls(float(found[1]), int(found[2] or 0))

    def __str__(self) -> str:
        return f"{self.rate:g}fps" + (f":{self.most}" if self.most else "")

    def serves(self, rate: float, most: int) -> bool:
        """Tells whether a model that takes `rate` frames a second and at most `most` of a video finds them kept.

        >>> FrameSpec(2.0).serves(1.0, 32), FrameSpec(1.0).serves(2.0, 32), FrameSpec(1.0, 64).serves(1.0, 32)
        (True, False, False)
        """
        if self.most:  # spread over the video: those of another number lie elsewhere
            return (rate, most) == (self.rate, self.most)
        return abs(self.rate / rate - round(self.rate / rate)) < 1e-9 and self.rate >= rate


def extract_frames(media: Media, spec: FrameSpec, limit: int) -> bytes:
    """Writes the frames that `spec` keeps of a video, upright, at the video's own size.

    Args:
        media: the video.
        spec: which frames.
        limit: the most bytes.

    Returns:
        A file with these frames at their times, as long as the video.

    Raises:
        SampleError: as `read_video`; "too_big_media" beyond `limit`.
    """
    most = spec.most or int(MAX_VIDEO_SECONDS * spec.rate) + 1
    probe, frames = read_video(media, spec.rate, most)
    written = io.BytesIO()
    with av.open(written, "w", format="mov", options={"video_track_timescale": str(_CLOCK)}) as container:
        # Pictures are packed, not encoded: the encoder that PyAV opens only tells the container their kind and size.
        track = container.add_stream("mjpeg", rate=Fraction(spec.rate).limit_denominator(1000))
        track.height, track.width, track.pix_fmt = probe.height, probe.width, "yuvj420p"
        ends = [*probe.times[1:], max(probe.seconds, probe.times[-1] + SLACK)]
        for begin, end, pixels in zip(probe.times, ends, frames, strict=True):
            packet = av.Packet(_jpeg(pixels))
            packet.stream, packet.time_base, packet.is_keyframe = track, Fraction(1, _CLOCK), True
            packet.pts = packet.dts = round(begin * _CLOCK)
            packet.duration = round(end * _CLOCK) - packet.pts
            container.mux(packet)
            if written.tell() > limit:
                raise SampleError("too_big_media", f"{media.name}: its frames at {spec} have more than {limit} bytes")
    data = written.getvalue()
    _check(Media(media.name, None, data), probe, spec, most)
    return data


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=QUALITY, subsampling="4:2:0")
    return file.getvalue()


def _check(media: Media, expected: VideoProbe, spec: FrameSpec, most: int) -> None:
    """Raises SampleError where a reader would not find the same times: a length on the border of one frame more."""
    found = probe_video(media, spec.rate, most)
    if (found.times, found.height, found.width) != (expected.times, expected.height, expected.width):
        raise SampleError(
            "unreadable_media", f"{media.name}: frames at {spec} do not keep its {expected.seconds:.4f} s"
        )
