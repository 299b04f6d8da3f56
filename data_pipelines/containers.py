"""Opening audio and video containers with PyAV, restricted to formats that only hold media.

FFmpeg also reads play lists that name other files, and takes plain text for a terminal recording; these are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.container import InputContainer
from av.stream import Stream

from data_pipelines.limits import check_bytes, check_packets
from data_pipelines.media import Media, reading

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mp3,aac,flac,wav,gif,amr"


@contextmanager
def opened(media: Media, kind: str) -> Iterator[InputContainer]:
    """The open container. What is raised inside becomes SampleError("unreadable_media"), naming `kind`."""
    with reading(media, kind):
        if media.size == 0:
            raise ValueError("the file is empty")
        check_bytes(media.size, "video", media.name)
        source = media.open() if media.path is None else str(media.path)
        with av.open(source, options={"format_whitelist": FORMATS}) as container:
            yield container


def header_duration(stream: Stream) -> float | None:
    """Seconds that the header gives this stream, or None."""
    if stream.duration is None or stream.time_base is None:
        return None
    return float(stream.duration * stream.time_base)


def demuxed_duration(container: InputContainer, stream: Stream, name: str) -> float:
    """Seconds from the first to the end of the last packet: reads the file through, decodes nothing.

    Raises ValueError when all streams end a second or more before the file's header says, SampleError("too_big_media")
    for too many packets.
    """
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for number, packet in enumerate(container.demux()):
        check_packets(number, name)
        if packet.pts is not None:
            start, end = (float(time * packet.time_base) for time in (packet.pts, packet.pts + (packet.duration or 0)))
            starts[packet.stream_index] = min(starts.get(packet.stream_index, start), start)
            ends[packet.stream_index] = max(ends.get(packet.stream_index, end), end)
    length = max(ends.values(), default=0.0) - min(starts.values(), default=0.0)
    if container.duration is not None and length < container.duration / av.time_base - 1.0:
        raise ValueError(f"the file is truncated: {length:.1f} of {container.duration / av.time_base:.1f} s")
    return ends.get(stream.index, 0.0) - starts.get(stream.index, 0.0)
