"""How long a video track is: by the container's table of frames, or by the clock of its packets.

Most containers promise no length, or only guess one: recordings without an end, transport streams, parts of streams
whose clock does not start at 0. Their packets are read through, nothing is decoded. A file is called truncated only
where it is shorter than what it promises.
"""

import io
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from data_pipelines.media.containers import check_packets, opened
from data_pipelines.media.location import Media

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


def lacks_frames(stream: VideoStream, media: Media) -> bool:
    """Tells whether the table of frames names bytes behind the file's end."""
    return any(entry.pos + entry.size > media.size for entry in stream.index_entries)


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
