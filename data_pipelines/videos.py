"""Video files: size and frame times from the header, the frames at those times.

Times count from the first frame. Rotation and pixel aspect in the container are ignored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from data_pipelines.containers import demuxed_duration, header_duration, opened
from data_pipelines.images import check_size
from data_pipelines.limits import MAX_FRAME_PIXELS, check_decoded, check_video
from data_pipelines.media import Media

_SLACK = 1e-3  # seconds; time stamps are rounded to the container's clock
_JUMP = 4.0  # seconds to the next frame wanted from which on key frames in between are looked for
_BEFORE = 1.0  # seconds by which a jump ends before the frame wanted: tables of key frames are in decoding order


@dataclass(frozen=True)
class VideoProbe:
    """Sides in pixels, the times in seconds of the frames that the model sees, and how long the video is."""

    height: int
    width: int
    times: tuple[float, ...]
    seconds: float


def probe_video(media: Media, frames_per_second: float, max_frames: int) -> VideoProbe:
    """What the header tells: the picture's size and the times of at most `max_frames` frames.

    Raises SampleError: "unreadable_media" for a file without a video track, or of a size that is refused;
    "too_big_media" beyond `limits`.
    """
    with _opened(media) as (container, stream):
        return _probe(container, stream, media.name, frames_per_second, max_frames)


def read_video(
    media: Media, frames_per_second: float, max_frames: int
) -> tuple[VideoProbe, Iterator[UInt8[np.ndarray, "h w 3"]]]:
    """What `probe_video` tells, and the RGB frames at its times, one by one: the file is opened once for both.

    Raises SampleError as `probe_video` and, while frames are taken, `decode_frames`.
    """
    found = _read(media, frames_per_second, max_frames)
    return next(found), found


def _read(media: Media, frames_per_second: float, max_frames: int) -> Iterator:
    with _opened(media) as (container, stream):
        probe = _probe(container, stream, media.name, frames_per_second, max_frames)
        yield probe
        if header_duration(stream) is None:
            container.seek(0)  # it was read through for its length
        yield from _Frames(container, stream, media.name).at(probe.times)


def decode_frames(media: Media, times: tuple[float, ...]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """RGB frames, one for each of the ascending `times`: the first frame at or after it, else the last of the video.

    Raises SampleError: "unreadable_media" when nothing can be decoded, or the video ends long before its header says;
    "too_big_media" when too much would have to be decoded for them.
    """
    with _opened(media) as (container, stream):
        return list(_Frames(container, stream, media.name).at(times))


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


class _Frames:
    """The frames of an open video, at the times asked for."""

    def __init__(self, container: InputContainer, stream: VideoStream, name: str):
        self._container, self._stream, self._name = container, stream, name
        self._convert = VideoReformatter()
        self._frames = container.decode(stream)
        self._pixels = 0  # decoded so far
        self._start: float | None = None
        self._last: VideoFrame | None = None
        self._time = 0.0  # of the last frame
        self._jumps = True

    def at(self, times: tuple[float, ...]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """As `decode_frames`."""
        picture, shown = None, None
        for wanted in times:
            self._jump(wanted)
            while self._last is None or self._time < wanted - _SLACK:
                if not self._next():
                    self._check_end(times[-1])
                    break
            if shown is not self._last:
                picture, shown = self._rgb(self._last), self._last
            yield picture

    def _next(self) -> bool:
        """Decodes one frame; False at the end."""
        frame = next(self._frames, None)
        if frame is None:
            return False
        self._pixels += frame.height * frame.width
        check_decoded(self._pixels, self._name)
        if self._start is None:
            self._start = frame.time or 0.0
        self._last = frame
        if frame.time is not None:
            self._time = frame.time - self._start
        return True

    def _jump(self, wanted: float) -> None:
        """Goes on at the last key frame well before `wanted`, when the table of contents names one ahead of here.

        The first frame from there must still lie before `wanted`; if not, everything is decoded from the beginning.
        """
        if not self._jumps or self._last is None or wanted - self._time < _JUMP:
            return
        place = self._key_frame(wanted - _BEFORE)
        if place is None:
            return
        self._go_to(place)
        if not self._next() or self._time > wanted + _SLACK:
            self._jumps = False
            self._go_to(self._stream.start_time or 0)
            self._next()

    def _key_frame(self, wanted: float) -> int | None:
        """Time stamp of the last key frame at or before `wanted`, if that is ahead."""
        table, unit = self._stream.index_entries, self._stream.time_base
        number = table.search_timestamp(int((self._start + wanted) / unit), backward=True)
        if number < 0:
            return None
        place = table[number].timestamp
        return place if float(place * unit) - self._start > self._time + _BEFORE else None

    def _go_to(self, place: int) -> None:
        self._container.seek(place, stream=self._stream)
        self._frames = self._container.decode(self._stream)

    def _check_end(self, wanted: float) -> None:
        promised = header_duration(self._stream)
        if self._last is None:
            raise ValueError("it holds no frame")
        if promised is not None and self._time < wanted - 1.0 and wanted <= promised:
            raise ValueError(f"the file is truncated: its last frame is at {self._time:.1f} s of {promised:.1f} s")

    def _rgb(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        return self._convert.reformat(frame, format="rgb24", threads=1).to_ndarray()


@contextmanager
def _opened(media: Media) -> Iterator[tuple[InputContainer, VideoStream]]:
    with opened(media, "video") as container:
        stream = _video_stream(container)
        if stream.codec_context is None:
            raise ValueError("its video codec is unknown")
        # Workers are the threads. A file may ask for larger frames than its header says.
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        yield container, stream


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise ValueError("it has no video track")


def _probe(
    container: InputContainer, stream: VideoStream, name: str, frames_per_second: float, max_frames: int
) -> VideoProbe:
    height, width = stream.codec_context.height, stream.codec_context.width
    duration = header_duration(stream)
    check_video(height, width, duration or 0.0, name)
    if duration is None:
        duration = demuxed_duration(container, stream, name)
        check_video(height, width, duration, name)
    check_size(height, width, name)
    return VideoProbe(height, width, frame_times(duration, frames_per_second, max_frames), duration)
