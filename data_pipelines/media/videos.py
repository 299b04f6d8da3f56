"""Video files: size and frame times, the frames at those times in RGB, upright.

Times count from the first frame. The container's display matrix (a phone held upright, a mirrored camera) is always
applied, as the released reader does; that pixels may be wider than high is ignored, as there. Colors are those the
stream says: its matrix (BT.601 where it says none) and range. Transparent pixels lie over white. A damaged packet costs
its frames, not the file.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8

from data_pipelines.media.containers import (
    MAX_FRAME_PIXELS,
    Damage,
    check_decoded,
    check_video,
    is_cut,
    measured_seconds,
    opened,
    promised_seconds,
)
from data_pipelines.media.images import check_size
from data_pipelines.media.location import Media
from data_pipelines.media.sparse_decoding import SLACK, SparseDecoder

_JUMP = 4.0  # seconds to the next frame wanted from which on key frames in between are looked for
_BEFORE = 1.0  # seconds by which a jump ends before the frame wanted: tables of key frames are in decoding order
# FFmpeg's own decoders of these leave out the alpha channel, which WebM keeps beside the packets.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_UNKNOWN_MATRICES = (2, 3)  # colors whose matrix is unspecified, or of a reserved number


@dataclass(frozen=True)
class VideoProbe:
    """Sides in pixels, the times in seconds of the frames that the model sees, and how long the video is."""

    height: int  # upright, in pixels
    width: int
    times: tuple[float, ...]  # in seconds, of the frames that the model sees
    seconds: float  # how long the video is


def probe_video(media: Media, frames_per_second: float, max_frames: int) -> VideoProbe:
    """Reads size, length, and the times of at most `max_frames` frames. Of the pixels, the first frame alone is
    decoded.

    Raises SampleError: "unreadable_media" for a file without a video track, truncated, or of a size that is refused;
    "too_big_media" beyond `limits`.
    """
    with _opened(media, Damage()) as frames:
        return _probe(frames, frames_per_second, max_frames)


def read_video(
    media: Media, frames_per_second: float, max_frames: int, damage: Damage | None = None
) -> tuple[VideoProbe, Iterator[UInt8[np.ndarray, "h w 3"]]]:
    """Reads what `probe_video` tells, and the RGB frames at its times: the file is opened once for both.

    Args:
        media: the file's bytes.
        frames_per_second: the rate at which frames are taken.
        max_frames: how many at most.
        damage: counts packets as they are decoded.

    Returns:
        The probe, and an iterator over frames (height, width, 3).

    Raises:
        SampleError: as `probe_video` and, while frames are taken, `decode_frames`.
    """
    found = _read(media, frames_per_second, max_frames, damage or Damage())
    return next(found), found


def _read(media: Media, frames_per_second: float, max_frames: int, damage: Damage) -> Iterator:
    with _opened(media, damage) as frames:
        probe = _probe(frames, frames_per_second, max_frames)
        yield probe
        yield from frames.at(probe.times)


def decode_frames(media: Media, times: tuple[float, ...]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Decodes RGB frames, one for each of the ascending `times`: the first at or after it, else the last of the video.

    Raises SampleError: "unreadable_media" when nothing can be decoded, more than a quarter of the packets are damaged,
    or frames lie behind the file's end; "too_big_media" when too much would have to be decoded for them.
    """
    with _opened(media, Damage()) as frames:
        return list(frames.at(times))


def frame_times(duration: float, frames_per_second: float, max_frames: int) -> tuple[float, ...]:
    """Spreads times in seconds at a fixed rate from 0, always at least one; when too many, `max_frames` of them evenly.

    Places between frames are cut to whole numbers, as in the released processor.

    >>> frame_times(3.5, 1.0, 32), frame_times(8.0, 1.0, 3)
    ((0.0, 1.0, 2.0, 3.0), (0.0, 3.0, 7.0))
    """
    count = max(1, ceil(duration * frames_per_second - SLACK))
    places = range(count)
    if count > max_frames:
        places = np.linspace(0, count - 1, max_frames).astype(int).tolist()
    return tuple(place / frames_per_second for place in places)


class _Frames:
    """The frames of an open video, at the times asked for."""

    def __init__(self, container: InputContainer, stream: VideoStream, media: Media, damage: Damage):
        self.container, self.stream, self.media = container, stream, media
        self._damage = damage
        # Packets of other tracks, and those when the last wanted frame was found.
        self._before = self._counted = (damage.packets, damage.damaged)
        self._convert = VideoReformatter()
        self._sparse = True
        self._start: float | None = None
        self._wanted: tuple[float, ...] = ()
        self._decode_from_here()
        self._pixels = 0  # decoded so far
        self._last: VideoFrame | None = None
        self._time = 0.0  # of the last frame
        self._jumps = True
        self._turn = _Turn()

    @property
    def turn(self) -> "_Turn":
        """How frames are turned; decodes the first one. Raises ValueError when there is none."""
        if self._last is None and not self._next():
            cut = "the file is truncated: " if is_cut(self.media) else ""
            raise ValueError(f"{cut}it holds no frame that can be decoded")
        return self._turn

    def at(self, times: tuple[float, ...]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yields frames as `decode_frames`."""
        turn, shown, found = self.turn, None, 0.0
        image: UInt8[np.ndarray, "h w 3"] | None = None
        for place, wanted in enumerate(times):
            self._decoder.wanted = self._wanted = times[place:]
            self._jump(wanted)
            self._find(wanted)
            if self._sparse and not self._is_exact(wanted):
                self._sparse = False
                self._return_before(found, wanted)
                self._find(wanted)
            found, self._counted = self._time, (self._damage.packets, self._damage.damaged)
            if self._ended:
                self._check_end(times[-1])
            frame = cast(VideoFrame, self._last)  # `turn` has decoded the first one
            if image is None or frame is not shown:
                image, shown = turn.apply(self._rgb(frame)), frame
            yield image
        self._damage.check()

    def _find(self, wanted: float) -> None:
        """Decodes until the first frame at or after `wanted`, or to the end."""
        while self._time < wanted - SLACK and self._next():
            pass

    def _is_exact(self, wanted: float) -> bool:
        """Tells whether the frame that was found is surely that of a whole decode.

        Damaged packets cost other frames where some are passed over, and are to be counted over all of them.
        """
        expected = self._decoder.expected(wanted)
        damaged = self._damage.damaged > self._counted[1]
        return not damaged and (expected is None or abs(expected - self._time) < SLACK / 10)

    def _decode_from_here(self) -> None:
        decoder = SparseDecoder(self.container, self.stream, self._damage, _alpha_decoder(self.stream))
        decoder.sparse &= self._sparse
        self._decoder, self._frames, self._ended = decoder, decoder.frames(), False
        decoder.wanted, decoder.start = self._wanted, self._start or 0.0

    def _next(self) -> bool:
        """Decodes one frame; False at the end."""
        frame = next(self._frames, None)
        if frame is None:
            self._ended = True
            return False
        self._pixels += frame.height * frame.width
        check_decoded(self._pixels, self.media.name)
        if self._start is None:
            self._start = self._decoder.start = frame.time or 0.0
            self._turn = _Turn.from_frame(frame)
        self._last = frame
        if frame.time is not None:
            self._time = frame.time - self._start
        return True

    def _jump(self, wanted: float) -> None:
        """Goes on at the last key frame well before `wanted`, when the table of contents names one ahead of here.

        The first frame from there must still lie before `wanted`; if not, everything is decoded from the beginning.
        """
        if not self._jumps or wanted - self._time < _JUMP:
            return
        place = self._key_frame(wanted - _BEFORE, self._time + _BEFORE)
        if place is not None:
            self._go_to(place, wanted)

    def _return_before(self, found: float, wanted: float) -> None:
        """Goes back to a key frame well before the frame at `found`, or to the beginning."""
        place = self._key_frame(found - _BEFORE, 0.0) if self._jumps else None
        # What is decoded once more is not counted twice.
        self._damage.packets, self._damage.damaged = self._before if place is None else self._counted
        self._go_to(self.stream.start_time or 0 if place is None else place, wanted)

    def _key_frame(self, wanted: float, after: float) -> int | None:
        """Returns the time stamp of the last key frame at or before `wanted`, if that lies behind `after` seconds."""
        table, unit, start = self.stream.index_entries, self.stream.time_base, self._start or 0.0
        if unit is None:
            return None
        number = table.search_timestamp(int((start + wanted) / unit), backward=True)
        if number < 0:
            return None
        place = table[number].timestamp
        return place if float(place * unit) - start > after else None

    def _go_to(self, place: int, wanted: float) -> None:
        """Decodes the first frame from the time stamp `place` on.

        Tables of key frames can be wrong: it must lie before the one wanted; if not, all is decoded from the beginning.
        """
        self.container.seek(place, stream=self.stream)
        self._decode_from_here()
        begin = self.stream.start_time or 0
        if (not self._next() or self._time > wanted + SLACK) and place > begin:
            self._jumps = False
            self._go_to(begin, wanted)

    def _check_end(self, wanted: float) -> None:
        """Checks the end: after the last frame, which may stay long, nothing is missing unless the table of frames says
        so.
        """
        self._damage.check()
        promised = promised_seconds(self.container, self.stream)
        if promised is None or not self._time < wanted <= promised:
            return
        # The table of frames tells: it names bytes behind the file's end.
        if any(entry.pos + entry.size > self.media.size for entry in self.stream.index_entries):
            raise ValueError(f"the file is truncated: its last frame is at {self._time:.1f} s of {promised:.1f} s")

    def _rgb(self, frame: VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        matrix = Colorspace.ITU601 if frame.colorspace in _UNKNOWN_MATRICES else None
        try:
            pixels = self._convert.reformat(
                frame, format="rgba" if has_alpha else "rgb24", src_colorspace=matrix, threads=1
            ).to_ndarray()
        except OSError as error:
            raise ValueError(f"its colors ({frame.format.name}, matrix {frame.colorspace}) are not read") from error
        return _over_white(pixels) if has_alpha else pixels


@dataclass(frozen=True)
class _Turn:
    """A display matrix by quarters: rows and columns change places, then they are mirrored."""

    transposed: bool = False
    mirrored: bool = False  # left and right
    flipped: bool = False  # up and down

    @classmethod
    def from_frame(cls, frame: VideoFrame) -> "_Turn":
        """Reads a frame's own matrix, which takes a pixel at (x, y) to (a x + c y, b x + d y)."""
        # By key: iterating gives the data in PyAV 18 and their types in 19.
        matrix = frame.side_data.get(cast(Any, Type.DISPLAYMATRIX))
        if matrix is None or len(bytes(matrix)) != 36:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
        transposed = abs(b) + abs(c) > abs(a) + abs(d)
        return cls(transposed, (c if transposed else a) < 0, (b if transposed else d) < 0)

    def sides(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self.transposed else (height, width)

    def apply(self, pixels: UInt8[np.ndarray, "a b 3"]) -> UInt8[np.ndarray, "h w 3"]:
        pixels = pixels.swapaxes(0, 1) if self.transposed else pixels
        return np.ascontiguousarray(pixels[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1])


def _over_white(pixels: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    color, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return np.ascontiguousarray(color)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _alpha_decoder(stream: VideoStream) -> Callable[[Packet], list[VideoFrame]] | None:
    """Returns what decodes a WebM track together with its alpha channel; None where it has none, or nothing here knows
    how.
    """
    name = _WITH_ALPHA.get(stream.codec_context.codec.name, "")
    if stream.metadata.get("alpha_mode") != "1" or name not in av.codecs_available:
        return None
    decoder = cast(VideoCodecContext, av.CodecContext.create(name, "r"))
    decoder.thread_count = 1
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    return lambda packet: decoder.decode(packet if packet.size else None)


@contextmanager
def _opened(media: Media, damage: Damage) -> Iterator[_Frames]:
    with opened(media, "video") as container:
        stream = _video_stream(container)
        if stream.codec_context is None:
            raise ValueError("its video codec is unknown")
        # Workers are the threads. A file may ask for larger frames than its header says.
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        yield _Frames(container, stream, media, damage)


def _video_stream(container: InputContainer) -> VideoStream:
    """Chooses the track marked as default, else the first; the cover of a song is no video."""
    tracks = [track for track in container.streams.video if not track.disposition & Disposition.attached_pic]
    if not tracks:
        raise ValueError("it has no video track")
    return next((track for track in tracks if track.disposition & Disposition.default), tracks[0])


def _probe(frames: _Frames, frames_per_second: float, max_frames: int) -> VideoProbe:
    height, width, name = frames.stream.codec_context.height, frames.stream.codec_context.width, frames.media.name
    duration = promised_seconds(frames.container, frames.stream)
    check_video(height, width, duration or 0.0, name)
    if duration is None:
        duration = measured_seconds(frames.media, frames.stream.index)
        check_video(height, width, duration, name)
    height, width = frames.turn.sides(height, width)
    check_size(height, width, name)
    return VideoProbe(height, width, frame_times(duration, frames_per_second, max_frames), duration)
