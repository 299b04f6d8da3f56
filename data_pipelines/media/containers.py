"""Audio and video containers: what one file may be at most, opening one with PyAV, how long its tracks are.

Files beyond a limit are refused as `too_big_media`, from size and header, before anything is decoded. The limits are
far above what a row of 65536 tokens can use (it holds 87 minutes of audio), and bound what one file costs a worker.
Headers can lie, so decoders count along.

Containers are restricted to formats that only hold media: FFmpeg also reads play lists that name other files, and takes
plain text for a terminal recording.

Most containers promise no length, or only guess one: recordings without an end, transport streams, parts of streams
whose clock does not start at 0. Their packets are read through, nothing is decoded. A file is called truncated only
where it is shorter than what it promises.
"""

import io
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
from av.video.stream import VideoStream

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
            # FFmpeg reads through our stream, which knows a failing disk from a damaged file.
            source: Any = stack.enter_context(media.open())
            if patched or media.path is None:
                source = _PatchedFile(source, patched)
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
    for packet in read_packets(container, stream, damage):
        yield from decode_packet(packet, damage, decode)


def decode_packet(packet: Packet, damage: Damage, decode: Callable[[Packet], list] | None = None) -> list:
    """Decodes one packet as `decode_packets` does; returns the frames that come out, none where it fails."""
    damage.packets += packet.size > 0
    try:
        return packet.decode() if decode is None else decode(packet)
    except FFmpegError:
        damage.damaged += packet.size > 0
        return []


def read_packets(container: InputContainer, stream: Stream, damage: Damage) -> Iterator[Packet]:
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


_PROMISING = {"mov", "matroska", "flv"}  # formats whose length is what the header says; of others FFmpeg guesses it
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # of the file
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # of the object with its size and length
_HEADER = 1 << 16  # bytes that are looked through for it
_SHORT = 1.0  # seconds by which a file may be shorter than what it promises
_SLOPPY = 64  # bytes by which sizes in headers are off without anything missing


def promised_seconds(container: InputContainer, stream: VideoStream) -> float | None:
    """Seconds of the track by a table that lists every frame (MP4, AVI); None where there is none, or a part of it."""
    if not {"mov", "avi"} & set(container.format.name.split(",")):
        return None
    if not stream.frames or stream.frames != len(stream.index_entries):
        return None
    if not stream.duration or stream.time_base is None:
        return None
    return float(stream.duration * stream.time_base)


@dataclass
class _Clock:
    """Times in seconds of a track's packets: the first, the last two, how long the last one lasts (0: not told)."""

    first: float = float("inf")
    before: float = float("-inf")
    last: float = float("-inf")
    lasts: float = 0.0

    def add(self, packet: Packet) -> None:
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.time_base is None:
            return
        start = float(time * packet.time_base)
        self.first = min(self.first, start)
        if start > self.last:
            self.before, self.last = self.last, start
            self.lasts = float((packet.duration or 0) * packet.time_base)
        else:
            self.before = max(self.before, start)

    @property
    def end(self) -> float:
        """A last frame without a length of its own stays as long as the one before it."""
        return self.last + (self.lasts or max(0.0, self.last - max(self.before, self.first)))


def measured_seconds(media: Media, number: int) -> float:
    """Seconds from the first to the end of the last packet of stream `number`: reads the file through.

    Raises ValueError when the file is truncated, SampleError("too_big_media") for too many packets.
    """
    clocks: dict[int, _Clock] = {}
    with opened(media, "video") as container:
        promising = bool(_PROMISING & set(container.format.name.split(",")))
        promised = container.duration / av.time_base if promising and container.duration else _header_seconds(media)
        try:
            for count, packet in enumerate(container.demux()):
                check_packets(count, media.name)
                if packet.size and not packet.is_discard:  # edit lists leave out the others
                    clocks.setdefault(packet.stream_index, _Clock()).add(packet)
        except FFmpegError:  # nothing more can be read: what came is what there is
            pass
    clocks = {place: clock for place, clock in clocks.items() if clock.last > float("-inf")}
    own = clocks.get(number)
    if own is None:
        return 0.0
    start, end = min(clock.first for clock in clocks.values()), max(clock.end for clock in clocks.values())
    # Some headers tell how long it takes, some what the clock shows at the end.
    length = promised - start if promised > start else promised
    if end - start < length - _SHORT:
        if is_cut(media) is not False:
            raise ValueError(f"the file is truncated: {end - start:.1f} of {length:.1f} s")
        return start + length - own.first  # all is there: the last frame stays
    return own.end - own.first


def _header_seconds(media: Media) -> float:
    """Reads the length in the header of an AVI or ASF file, of which FFmpeg tells only as much as is there; 0: none."""
    with media.open() as file:
        head = file.read(_HEADER)
    number = lambda place, size: int.from_bytes(head[place : place + size], "little")  # noqa: E731
    if head[:4] == b"RIFF" and head[24:28] == b"avih":
        return number(32, 4) * number(48, 4) / 1e6  # microseconds a frame, frames
    if head[:16] == _ASF and (place := head.find(_ASF_PROPERTIES)) >= 0:
        return max(0.0, number(place + 64, 8) / 1e7 - number(place + 80, 8) / 1e3)  # that of the play, its lead
    return 0.0


def is_cut(media: Media) -> bool | None:
    """Tells whether the file ends before the sizes in its own headers say; None where it has none (MPEG-TS,
    live WebM).
    """
    with media.open() as file:
        head = file.read(_HEADER)
        if head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
            unknown = end in (8, 8 + 0xFFFFFFFF)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            end = _segment_end(file)
            unknown = end == 0
        elif head[:16] == _ASF:
            place = head.find(_ASF_PROPERTIES)
            end = int.from_bytes(head[place + 40 : place + 48], "little")
            unknown = place < 0 or end == 0
        elif head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
            end, unknown = _boxes_end(file, media.size), False
        else:
            return None
    return None if unknown else end > media.size + _SLOPPY


def _segment_end(file: io.BufferedIOBase) -> int:
    """Finds where the segment of a Matroska file ends; 0: it does not say."""
    file.seek(4)
    size = _read_size(file)
    file.seek(size or 0, io.SEEK_CUR)
    if size is None or file.read(4) != b"\x18\x53\x80\x67":
        return 0
    size = _read_size(file)
    return file.tell() + size if size else 0


def _read_size(file: io.BufferedIOBase) -> int | None:
    """Reads a number of EBML: the zeros before its first one tell how many bytes follow; all ones mean unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (1 << 7 - more) - 1]) + file.read(more), "big")
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def _boxes_end(file: io.BufferedIOBase, size: int) -> int:
    """Finds where the last box of an MP4 ends."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        length = int.from_bytes(head[8:16], "big") if length == 1 else length
        if length < 8 or not head[4:8].isalnum():  # 0: to the end of the file; else it is no box, but something behind
            return size
        place += length
    return place
