"""Video files: size and frame times from the header, the frames at those times.

Times count from the first frame. Rotation and pixel aspect in the container are ignored.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from jaxtyping import UInt8

from data_pipelines.containers import demuxed_duration, header_duration, opened
from data_pipelines.images import check_size
from data_pipelines.media import Media

_SLACK = 1e-3  # seconds; time stamps are rounded to the container's clock


@dataclass(frozen=True)
class VideoProbe:
    """Sides in pixels, and the times in seconds of the frames that the model sees."""

    height: int
    width: int
    times: tuple[float, ...]


def probe_video(media: Media, frames_per_second: float, max_frames: int) -> VideoProbe:
    """What the header tells: the picture's size and the times of at most `max_frames` frames.

    Raises SampleError("unreadable_media") for a file without a video track, or of a size that is refused.
    """
    with opened(media, "video") as container:
        stream = _video_stream(container)
        height, width = stream.codec_context.height, stream.codec_context.width
        duration = _duration(container, stream)
    check_size(height, width, media.name)
    return VideoProbe(height, width, frame_times(duration, frames_per_second, max_frames))


def frame_times(duration: float, frames_per_second: float, max_frames: int) -> tuple[float, ...]:
    """Times in seconds at a fixed rate from 0, always at least one; when too many, `max_frames` spread evenly.

    >>> frame_times(3.5, 1.0, 32), frame_times(9.0, 1.0, 3)
    ((0.0, 1.0, 2.0, 3.0), (0.0, 4.0, 8.0))
    """
    count = max(1, ceil(duration * frames_per_second - _SLACK))
    places = range(count)
    if count > max_frames:
        places = np.linspace(0, count - 1, max_frames).round().astype(int).tolist()
    return tuple(place / frames_per_second for place in places)


def decode_frames(media: Media, times: tuple[float, ...]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """RGB frames, one for each of the ascending `times`: the first frame at or after it, else the last of the video.

    Raises SampleError("unreadable_media") when nothing can be decoded, or the video ends long before its header says.
    """
    frames: list[np.ndarray] = []
    with opened(media, "video") as container:
        stream = _video_stream(container)
        promised = header_duration(stream)
        start, time, last = None, 0.0, None
        for last in container.decode(stream):
            stamp = time if last.time is None else last.time
            start = stamp if start is None else start
            time = stamp - start
            if time >= times[len(frames)] - _SLACK:
                picture = last.to_ndarray(format="rgb24")
                while len(frames) < len(times) and time >= times[len(frames)] - _SLACK:
                    frames.append(picture)
            if len(frames) == len(times):
                return frames
        if last is None:
            raise ValueError("it holds no frame")
        if promised is not None and time < times[-1] - 1.0 and times[-1] <= promised:
            raise ValueError(f"the file is truncated: its last frame is at {time:.1f} s of {promised:.1f} s")
        picture = last.to_ndarray(format="rgb24")
        return frames + [picture] * (len(times) - len(frames))


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise ValueError("it has no video track")


def _duration(container: InputContainer, stream: VideoStream) -> float:
    duration = header_duration(stream)
    return demuxed_duration(container, stream) if duration is None else duration
