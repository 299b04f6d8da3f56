"""What one media file may be at most, and opening audio and video containers with PyAV.

Files beyond a limit are refused as `too_big_media`, from size and header, before anything is decoded. The limits are
far above what a row of 65536 tokens can use (it holds 87 minutes of audio), and bound what one file costs a worker.
Headers can lie, so decoders count along.

Containers are restricted to formats that only hold media: FFmpeg also reads play lists that name other files, and takes
plain text for a terminal recording.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any, cast

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.frame import Frame
from av.packet import Packet
from av.stream import Stream

from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, UnknownFormatError, kind_name, reading

MAX_BYTES = {"image": 2**28, "audio": 2**31, "video": 2**33}

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
    _check(size, MAX_BYTES[kind], name, f"bytes of one {kind_name(kind)}")


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises SampleError("too_big_media") when a still has too many pixels."""
    _check(height * width, MAX_PIXELS, name, f"pixels ({height}x{width})")


def check_audio(samples: int, rate: int, channels: int, name: str) -> None:
    """Refuses audio that is too long, or has too many samples or channels, or too fine ones.

    Args:
        samples: how many moments it has.
        rate: samples a second.
        channels: how many channels.
        name: what messages call it.

    Raises:
        SampleError: "too_big_media".
    """
    _check(samples / rate, MAX_AUDIO_SECONDS, name, "seconds of audio")
    _check(samples, MAX_AUDIO_SAMPLES, name, "samples of audio")
    _check(rate, MAX_SAMPLING_RATE, name, "samples a second")
    _check(channels, MAX_CHANNELS, name, "channels")


def check_video(height: int, width: int, seconds: float, name: str) -> None:
    """Refuses a video whose frames are too large, or that is too long.

    Args:
        height: pixels of a frame.
        width: pixels of a frame.
        seconds: its length.
        name: what messages call it.

    Raises:
        SampleError: "too_big_media".
    """
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


FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mp3,aac,flac,wav,gif,amr,"
    "aiff,au,caf,w64,nistsphere"
)


@contextmanager
def opened(media: Media, kind: str, patched: Sequence[tuple[int, bytes]] = ()) -> Iterator[InputContainer]:
    """Opens a container. What is raised inside becomes SampleError("unreadable_media"), naming `kind`.

    `patched` has offsets and the bytes to be read there instead of the file's own.
    """
    with reading(media, kind):
        if media.size == 0:
            raise ValueError("the file is empty")
        check_bytes(media.size, "video", media.name)
        with ExitStack() as stack:
            source: Any = str(media.path)
            if patched or media.path is None:
                source = _PatchedFile(stack.enter_context(media.open()), patched)
            try:
                container = stack.enter_context(av.open(source, mode="r", options={"format_whitelist": FORMATS}))
            except ArgumentError as error:  # FFmpeg's word for formats that are not on the list
                raise UnknownFormatError("its format is none of those that are read") from error
            yield cast(InputContainer, container)  # opened for reading


class _PatchedFile:
    """A file of which some bytes are others."""

    def __init__(self, file: BufferedIOBase, patched: Sequence[tuple[int, bytes]]):
        self._file, self._mended = file, patched
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        """Reads the next `size` bytes, or all."""
        if not self._mended:
            return self._file.read(size)
        place = self.tell()
        data = bytearray(self._file.read(size))
        for start, new in self._mended:
            first, last = max(place, start), min(place + len(data), start + len(new))
            if first < last:
                data[first - place : last - place] = new[first - start : last - start]
        return bytes(data)


@dataclass
class Damage:
    """Packets that were decoded of one or several tracks, and how many of them were damaged and cost their frames."""

    packets: int = 0
    damaged: int = 0

    def check(self) -> None:
        """Raises ValueError when more than one packet, and more than a quarter of them, cannot be decoded."""
        if self.damaged > max(1, self.packets // 4):
            raise ValueError(f"{self.damaged} of {self.packets} packets are damaged")


def decode_packets(
    container: InputContainer, stream: Stream, damage: Damage, decode: Callable[[Packet], list] | None = None
) -> Iterator[Frame]:
    """Decodes the frames of a track from here on, without those of packets that fail.

    Args:
        container: the open file.
        stream: the track.
        damage: counts packets, and those that cannot be decoded.
        decode: takes the place of the track's own decoder.

    Yields:
        The frames, in order.
    """
    for packet in _read_packets(container, stream, damage):
        damage.packets += packet.size > 0
        try:
            frames = packet.decode() if decode is None else decode(packet)
        except FFmpegError:
            damage.damaged += packet.size > 0
            continue
        yield from frames


def _read_packets(container: InputContainer, stream: Stream, damage: Damage) -> Iterator[Packet]:
    """Yields packets to the end; where reading fails it goes on behind, as long as something comes."""
    came = True
    while came:
        came = False
        try:
            for packet in container.demux(stream):
                came = True
                yield packet
            return
        except FFmpegError:
            damage.packets += 1
            damage.damaged += 1
