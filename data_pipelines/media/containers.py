"""Opening audio and video containers with PyAV, restricted to formats that only hold media.

FFmpeg also reads play lists that name other files, and takes plain text for a terminal recording; these are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase

import av
from av.container import InputContainer
from av.frame import Frame
from av.packet import Packet
from av.stream import Stream

from data_pipelines.media.limits import check_bytes
from data_pipelines.media.location import Media, UnknownFormatError, reading

FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mp3,aac,flac,wav,gif,amr,"
    "aiff,au,caf,w64,nistsphere"
)


@contextmanager
def opened(media: Media, kind: str, mended: Sequence[tuple[int, bytes]] = ()) -> Iterator[InputContainer]:
    """The open container. What is raised inside becomes SampleError("unreadable_media"), naming `kind`.

    `mended` has offsets and the bytes to be read there instead of the file's own.
    """
    with reading(media, kind):
        if media.size == 0:
            raise ValueError("the file is empty")
        check_bytes(media.size, "video", media.name)
        with ExitStack() as stack:
            source = str(media.path)
            if mended or media.path is None:
                source = _Mended(stack.enter_context(media.open()), mended)
            try:
                container = stack.enter_context(av.open(source, options={"format_whitelist": FORMATS}))
            except av.error.ArgumentError as error:  # FFmpeg's word for formats that are not on the list
                raise UnknownFormatError("its format is none of those that are read") from error
            yield container


class _Mended:
    """A file of which some bytes are others."""

    def __init__(self, file: BufferedIOBase, mended: Sequence[tuple[int, bytes]]):
        self._file, self._mended = file, mended
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all."""
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
    """The frames of a track from here on, without those of packets that cannot be decoded, which `damage` counts.

    `decode` takes the place of the track's own decoder.
    """
    for packet in _read_packets(container, stream, damage):
        damage.packets += packet.size > 0
        try:
            frames = packet.decode() if decode is None else decode(packet)
        except av.FFmpegError:
            damage.damaged += packet.size > 0
            continue
        yield from frames


def _read_packets(container: InputContainer, stream: Stream, damage: Damage) -> Iterator[Packet]:
    """Packets to the end; where reading fails it goes on behind, as long as something comes."""
    came = True
    while came:
        came = False
        try:
            for packet in container.demux(stream):
                came = True
                yield packet
            return
        except av.FFmpegError:
            damage.packets += 1
            damage.damaged += 1
