"""The audio track of a file, opened and decoded packet by packet: what its header promises, and what it bears out.

FFmpeg (through PyAV) decodes. Where a header promises a length that the file bears out, decoding must give exactly
that; silence stands in the place of a damaged packet, and nothing else is returned that was not decoded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec.context import Flags2
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition
from jaxtyping import Float32

from data_pipelines.errors import SampleError
from data_pipelines.media.audio_packets import (
    check_boxes,
    check_segment,
    flac_promise,
    mpeg_promise,
    ogg_promise,
    tag_bytes,
)
from data_pipelines.media.audio_sizes import (
    Promise,
    aiff_promise,
    au_promise,
    caf_promise,
    check_riff,
    is_w64,
    sphere_promise,
    w64_promise,
    wave_promise,
)
from data_pipelines.media.containers import MAX_AUDIO_SAMPLES, Damage, check_audio, check_bytes, check_packets, opened
from data_pipelines.media.location import Media, reading

TOLERANCE = 0.1  # seconds by which decoded audio may differ from what was promised or measured
LOUDEST = 16.0  # full scale is 1; lossy codecs overshoot it a little, damaged files and wrong encodings by far
# Containers whose header gives the length of the whole video: a promise to a second, tracks may end before.
_PROMISING = ("matroska,webm", "asf", "flv")
_LARGEST_GAP = 4 * 65535  # samples of FLAC frames that a damaged one can take along


def convert_length(samples: int, found: int, rate: int) -> int:
    """Converts samples at `found` Hz to samples at `rate` Hz, rounded to the nearest."""
    return (samples * rate + found // 2) // found


@dataclass
class AudioTrack:
    """The chosen audio track of an open file, to be decoded once. `damage` counts its packets."""

    container: InputContainer
    stream: AudioStream
    name: str
    promise: Promise
    check_whole: Callable[[], bool]
    damage: Damage = field(default_factory=Damage, init=False)
    whole: bool = field(default=False, init=False)  # nothing is cut off, by sizes in the file

    def blocks(self) -> Iterator[tuple[int, Float32[np.ndarray, "_"]]]:
        """Yields mono samples with their rate, in order, exactly as many as are promised.

        Raises ValueError where the file falls short of its promise or too much is damaged, SampleError("too_big_media")
        as soon as there are too many samples, whatever the header says.
        """
        # Stage 1: what the file's own sizes say, before anything is decoded.
        self.whole = self.check_whole()
        self.damage.damaged += self.promise.damaged
        seconds, samples, rate = 0.0, 0, self.promise.rate or self.stream.rate
        # Stage 2: decode, counting along, as headers can lie.
        for rate, block in self._decoded():
            samples += len(block)
            seconds += len(block) / rate
            if samples > MAX_AUDIO_SAMPLES:
                raise SampleError("too_big_media", f"{self.name} holds more than {MAX_AUDIO_SAMPLES} samples of audio")
            check_audio(round(seconds * rate), rate, 1, self.name)
            left = self._promised(rate)
            # What a decoder gives beyond the promise is the filling of its last packet.
            block = block if left is None else block[: max(0, left - samples + len(block))]
            if len(block):
                yield rate, block
        # Stage 3: hold what came against the promise; small gaps become silence, large ones an error.
        promised = self._promised(rate)
        least = promised if promised is not None else convert_length(self.promise.least, self.promise.rate or 1, rate)
        if samples < least - min((TOLERANCE + 0.2 * self.damage.damaged) * rate, least / 2):
            raise ValueError(f"the file is truncated: {samples} of {least} samples")
        if promised is not None and samples > promised + TOLERANCE * rate:
            raise ValueError(f"its header promises {promised} samples, it holds {samples}")
        if promised is not None and samples < promised:
            self.damage.damaged = max(self.damage.damaged, 1)
            yield rate, np.zeros(promised - samples, np.float32)

    def _promised(self, rate: int) -> int | None:
        exact = self.promise.samples
        return None if exact is None else convert_length(exact, self.promise.rate, rate)

    def _decoded(self) -> Iterator[tuple[int, Float32[np.ndarray, "_"]]]:
        """Yields what the decoder gives, packet by packet. A damaged one costs itself alone.

        Silence stands for it where the length is promised, or known (FLAC), so that the rest keeps its time. Else
        nothing does: what could not be decoded may have been no audio at all.
        """
        before = given = 0
        keeps = self.promise.samples is not None
        flac = self.container.format.name == "flac" and self.stream.time_base == Fraction(1, self.stream.rate)
        clocked, lossy = flac, not self.stream.codec_context.name.startswith("pcm_")
        for packet in self._packets():
            self.damage.packets += packet.size > 0
            # A frame whose end is damaged is lost inside of a packet with those behind it: the next clock tells.
            missing = packet.pts - given if clocked and before and packet.pts is not None else 0
            if 0 < missing <= _LARGEST_GAP:
                self.damage.damaged += 1
                given += missing
                yield self.stream.rate, np.zeros(missing, np.float32)
            try:
                frames = packet.decode()
            except FFmpegError:
                # FFmpeg's parser takes part of some last frames for one more: where all is there, it is no damage.
                if clocked and self.promise.samples is not None and given >= self.promise.samples:
                    continue
                self.damage.damaged += 1
                if keeps or (clocked and before):
                    given += self._duration(packet) or before
                    yield self.stream.rate, np.zeros(self._duration(packet) or before, np.float32)
                continue
            for frame in frames:
                before = frame.samples
                given += frame.samples
                clocked = flac and frame.sample_rate == self.stream.rate  # else the header has another clock
                wave = _mono(frame)
                # Decoders make noise of some damaged packets. Plain samples are what the file says: never so.
                if lossy and not np.abs(wave).max(initial=0) <= LOUDEST:
                    self.damage.damaged += 1
                    wave = np.zeros_like(wave)
                yield frame.sample_rate, wave
        self.damage.check()

    def _duration(self, packet: Packet) -> int:
        """Returns the length in samples, 0 where the packet does not tell."""
        if not packet.duration or not packet.time_base:
            return 0
        return round(packet.duration * packet.time_base * self.stream.rate)

    def _packets(self) -> Iterator[Packet]:
        """Yields the track's packets; the last ones are empty and make the decoder give what it holds back.

        Raises ValueError when all tracks end a second or more before the header of the container says, unless no byte
        is missing and the damaged rest is at most a quarter.
        """
        promised = self.container.duration if self.container.format.name in _PROMISING else None
        start, end, number = float("inf"), 0.0, 0
        packets = self.container.demux() if promised is not None else self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:  # the demuxer cannot go on: as with ffmpeg, what came before counts
                self.damage.damaged += 1
                break
            if packet is None:
                break
            check_packets(number := number + 1, self.name)
            if packet.pts is not None and packet.time_base:
                start = min(start, float(packet.pts * packet.time_base))
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == self.stream.index:
                yield packet
        # A clock need not start at 0: the header gives the length, or the time at the end.
        length = promised / av.time_base if promised is not None else 0.0
        missing = length - max(end, end - start)
        if missing > 1.0 and self.whole and missing <= length / 4:
            self.damage.damaged = max(self.damage.damaged, 1)
        elif missing > 1.0:
            what = "too much of the file is damaged" if self.whole else "the file is truncated"
            raise ValueError(f"{what}: {end - min(start, end):.1f} of {length:.1f} s")


def _mono(frame: AudioFrame) -> Float32[np.ndarray, "t"]:
    """Averages the channels, full scale 1."""
    values = frame.to_ndarray()  # (channels, t), or (1, t * channels) where they lie side by side
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    mean = values[0] if len(values) == 1 else values.mean(0)
    if values.dtype == np.uint8:
        return (mean.astype(np.float32) - 128) / 128
    if values.dtype.kind != "i":
        return mean.astype(np.float32)
    bits = 8 * values.dtype.itemsize
    return (mean * np.float64(2.0 ** (1 - bits))).astype(np.float32)


@contextmanager
def open_track(media: Media) -> Iterator[AudioTrack]:
    """Opens the audio of a file, ready to be decoded.

    Raises SampleError: "unreadable_media" for a file without audio or a truncated one, "too_big_media" beyond `limits`.
    """
    with reading(media, "audio"):
        if media.size == 0:
            raise ValueError("the file is empty")
        promise = _header_promise(media)
        if promise.rate:
            check_audio(promise.samples or promise.least, promise.rate, promise.channels, media.name)
    with opened(media, "audio", promise.patched) as container:
        stream = _audio_stream(container, media.name)
        if promise.samples is None and not promise.least:
            samples = _table_length(container, stream)
            promise = promise if samples is None else Promise(samples, 0, stream.rate)
        elif promise.rate != stream.rate:
            promise = replace(promise, samples=None)  # the decoder reads another thing than the header
        check_audio(promise.samples or 0, stream.rate, stream.channels, media.name)
        if not any(not other.disposition & Disposition.attached_pic for other in container.streams.video):
            check_bytes(media.size, "audio", media.name)
        yield AudioTrack(container, stream, media.name, promise, partial(_check_whole, media))


def _header_promise(media: Media) -> Promise:
    """Reads what the header promises. Raises ValueError for a file that is shorter."""
    size = media.size
    with media.open() as file:
        start = tag_bytes(file)
        file.seek(start)
        head = file.read(64)
        if head[:4] == b"RIFX":
            raise ValueError("RIFX, a WAV of big-endian order, is not read")
        if head[:4] == b"fLaC":
            return flac_promise(file, size, start)
        if head[:4] in (b"RIFF", b"RF64", b"BW64") and not start:
            return wave_promise(file, size) if head[8:12] == b"WAVE" else check_riff(file, size)
        if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC") and not start:
            return aiff_promise(file, size)
        if is_w64(head) and not start:
            return w64_promise(file, size)
        known = {b".snd": au_promise, b"caff": caf_promise, b"NIST": sphere_promise, b"OggS": ogg_promise}
        if head[:4] in known and not start:
            return known[head[:4]](file, size)
        if head[:2] >= b"\xff\xe0":
            return mpeg_promise(file, size)
    return Promise()


def _check_whole(media: Media) -> bool:
    """Tells whether a Matroska file is whole by its own size; raises ValueError for a video that goes on past
    its end.
    """
    with media.open() as file:
        head = file.read(8)
        if head[4:] == b"ftyp":
            check_boxes(file, media.size)
        elif head[:4] == b"\x1a\x45\xdf\xa3":
            return check_segment(file, media.size)
    return False


def _audio_stream(container: InputContainer, name: str) -> AudioStream:
    """Chooses the track marked as default, else the first."""
    if not container.streams.audio:
        raise ValueError("it has no audio track")
    tracks = container.streams.audio
    stream = next((track for track in tracks if track.disposition & Disposition.default), tracks[0])
    if stream.codec_context is None:
        raise ValueError("its audio codec is unknown")
    if not stream.rate:
        raise ValueError("its audio track has no sampling rate")
    stream.codec_context.thread_count = 1  # workers are the threads
    if stream.codec_context.name == "flac":  # without it, a damaged frame is noise
        stream.codec_context.options = {"err_detect": "crccheck+explode"}
    if stream.codec_context.name == "alac" and container.format.name == "caf":
        # The last packet says itself that it is short; FFmpeg would cut off as much once more.
        stream.codec_context.flags2 |= Flags2.skip_manual
    for other in container.streams:
        if other is not stream and container.format.name not in _PROMISING:
            other.discard = Discard.all
    return stream


def _table_length(container: InputContainer, stream: AudioStream) -> int | None:
    """Returns the samples of AAC in MP4 by its table of packets, less the encoder's delay; None where that is not
    plain.

    Every packet has 1024; the clock starts at -delay, and what lies before 0 is not heard. FFmpeg plays the last packet
    whole up to libavcodec 62, and as far as the track lasts from 63 on.
    """
    codec, table = stream.codec_context, stream.index_entries
    plain = container.format.name.startswith("mov,") and codec.name == "aac" and codec.frame_size == 1024
    if not plain or stream.time_base != Fraction(1, stream.rate) or not len(table) or len(table) != stream.frames:
        return None
    first, last = table[0].timestamp, table[len(table) - 1]
    if last.timestamp - first != 1024 * (len(table) - 1):
        return None
    end = last.timestamp + 1024
    if stream.duration and av.library_versions["libavcodec"][0] >= 63:
        end = min(end, stream.duration)
    return max(0, end - max(first, 0))
