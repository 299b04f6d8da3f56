"""Opening audio and video containers with PyAV, restricted to formats that only hold media.

FFmpeg also reads play lists that name other files, and takes plain text for a terminal recording; these are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.container import InputContainer
from av.stream import Stream

from data_pipelines.media import Media, reading

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mp3,aac,flac,wav,gif,amr"


@contextmanager
def opened(media: Media, kind: str) -> Iterator[InputContainer]:
    """The open container. What is raised inside becomes SampleError("unreadable_media"), naming `kind`."""
    with reading(media, kind):
        if media.path is not None and media.path.stat().st_size == 0:
            raise ValueError("the file is empty")
        source = media.open() if media.path is None else str(media.path)
        with av.open(source, options={"format_whitelist": FORMATS}) as container:
            yield container


def header_duration(stream: Stream) -> float | None:
    """Seconds that the header gives this stream, or None."""
    if stream.duration is None or stream.time_base is None:
        return None
    return float(stream.duration * stream.time_base)


def demuxed_duration(container: InputContainer, stream: Stream) -> float:
    """Seconds from the first to the end of the last packet: reads the file through, decodes nothing."""
    first, last = None, 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            first = packet.pts if first is None else min(first, packet.pts)
            last = max(last, packet.pts + (packet.duration or 0))
    return 0.0 if first is None else float((last - first) * stream.time_base)
