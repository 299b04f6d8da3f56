"""Decoding of a video track only what the frames at the times asked for need; the frames are those of a whole decode.

Two things are passed over. Groups of pictures in which no wanted frame lies: the decoder goes on at the key frame
behind them. And inside a group the frames that no other one refers to (B-frames, most often), unless they are wanted:
the time stamps of all packets as far as the next key frame are known before the first of them is decoded, so which
frame will be the first at or after a wanted time is known, too. The reader compares that with what comes out, and
decodes everything where it differs.
"""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import inf
from typing import cast

from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data_pipelines.media.containers import Damage, decode_packet, read_packets

SLACK = 1e-3  # seconds; time stamps are rounded to the container's clock
_ROUNDING = 1e-6  # seconds by which two ways of computing one time may differ
# Codecs whose key frames forget all frames before them, and those of them whose decoder can leave out single frames.
_RESTARTING = {"h264", "hevc", "vp8", "vp9", "av1"}
_SKIPPING = {"h264", "hevc"}
_MOST_AHEAD = 1024  # packets, and bytes, that are looked through for the next key frame
_MOST_BYTES = 1 << 26
_IDR, _RANDOM_ACCESS = range(5, 6), range(16, 24)  # types of NAL units: of H.264, of HEVC


class SparseDecoder:
    """Decodes a track from where its container stands, in the order of display.

    `wanted` has the times in seconds that are still to be found, ascending; while it is empty everything is decoded.
    """

    def __init__(
        self,
        container: InputContainer,
        stream: VideoStream,
        damage: Damage,
        decode: Callable[[Packet], list] | None = None,
    ):
        """Takes the place of the track's own decoder where `decode` is given: nothing is passed over then."""
        context = stream.codec_context
        extra = bytes(context.extradata or b"")
        name = context.codec.canonical_name
        self.sparse = decode is None and name in _RESTARTING
        self.wanted: Sequence[float] = ()
        self.start = 0.0  # seconds that the first frame's time stamp shows
        self._stream, self._damage, self._decode, self._name = stream, damage, decode, name
        # In HEVC a frame that its own layer does not refer to may serve higher ones: skipped where there is one layer.
        self._skips = name in _SKIPPING and (name == "h264" or (extra[:1] == b"\x01" and extra[21] >> 3 & 7 == 1))
        self._length_bytes = _length_bytes(extra, name)
        self._packets = read_packets(container, stream, damage)
        self._ahead: deque[Packet] = deque()
        self._bytes = 0  # of the packets in `_ahead`
        self._keys: deque[Packet] = deque()  # those of `_ahead` at which decoding can begin
        self._times: list[float] = []  # of the packets that came, ascending
        self._given: set[float] = set()  # those of the packets of this group that were decoded whole
        self._at_key = self._all_read = False  # whether the last packet taken begins a group; whether there are no more
        self._passed = False  # whether anything was passed over

    def frames(self) -> Iterator[VideoFrame]:
        """Yields frames to the end; those at the wanted times are among them."""
        context, drained = self._stream.codec_context, False
        while (packet := self._take()) is not None:
            # 1. Nothing more of this group is wanted: the decoder goes on behind it, and forgets it.
            dropped = drained
            while packet is not None and ((drained and not self._at_key) or self._begins_later(packet)):
                packet, dropped = self._take(), True
            if packet is None:
                return
            if dropped:
                context.flush_buffers()
                self._given.clear()
                self._passed = True
            # 2. Within a group: frames that nothing refers to are left out by the decoder where it is told so.
            skip = self._can_skip(packet)
            if self._skips:
                context.skip_frame = "NONREF" if skip else "DEFAULT"
                self._passed |= skip
            yield from decode_packet(packet, self._damage, self._decode)
            # 3. What the decoder holds back until more packets come is had at once where no more are needed.
            if not skip and packet.pts is not None:
                self._given.add(_seconds(packet))
            drained = self._is_served()
            if drained:
                yield from decode_packet(self._last_packet(), self._damage)

    def expected(self, wanted: float) -> float | None:
        """Returns the time of the frame that a whole decode gives for `wanted`, by the packets that came; None: the
        packets do not tell. Infinity where they tell no longer, but something was passed over.
        """
        if not self.sparse or not self._times:
            return inf if self._passed else None
        place = bisect_left(self._times, self.start + wanted - SLACK)
        return self._times[min(place, len(self._times) - 1)] - self.start

    def _take(self) -> Packet | None:
        """Takes the next packet, with those up to the next key frame read ahead; None at the end."""
        if not self._ahead and not self._read():
            return None
        packet = self._ahead.popleft()
        self._bytes -= packet.size
        self._at_key = bool(self._keys) and packet is self._keys[0]
        if self._at_key:
            self._keys.popleft()
        # Only where frames are wanted: a look at the first frame reads no more than that.
        reading = self.sparse and bool(self.wanted)
        while reading and not self._keys and len(self._ahead) < _MOST_AHEAD and self._bytes < _MOST_BYTES:
            reading = self._read()
        return packet

    def _begins_later(self, packet: Packet) -> bool:
        """Tells whether the next wanted frame lies at or behind a key frame that comes after `packet`."""
        if not (self.sparse and self.wanted and self._keys):
            return False
        first = bisect_left(self._times, self.start + self.wanted[0] - SLACK)
        return first == len(self._times) or self._times[first] >= _seconds(self._keys[0])

    def _is_served(self) -> bool:
        """Tells whether the decoder has been given every wanted frame that lies before the next key frame."""
        if not (self.sparse and self.wanted and self._ahead and (self._keys or self._all_read)):
            return False
        border = _seconds(self._keys[0]) if self._keys else inf
        for wanted in self.wanted:
            place = bisect_left(self._times, self.start + wanted - SLACK)
            time = self._times[min(place, len(self._times) - 1)]
            if time >= border:
                break
            if time not in self._given:
                return False
        return True

    def _last_packet(self) -> Packet:
        """Makes the packet that ends a track: the decoder gives what it holds."""
        packet = Packet()
        packet.stream, packet.time_base = self._stream, cast(Fraction, self._stream.time_base)
        return packet

    def _read(self) -> bool:
        """Reads one packet more; False at the end."""
        packet = next(self._packets, None)
        if packet is None:
            self._all_read = True
            return False
        self._ahead.append(packet)
        self._bytes += packet.size
        if not packet.size:  # the end: asks the decoder for what it holds
            return True
        if packet.pts is None:  # which frame it holds is known only when it is decoded
            self.sparse = False
        elif not packet.is_discard:
            insort(self._times, _seconds(packet))
            if self._restarts(packet):
                self._keys.append(packet)
        return True

    def _can_skip(self, packet: Packet) -> bool:
        """Tells whether a packet holds no wanted frame: none that is the first at or after a time, nor the last."""
        if not self.sparse or not self.wanted or not packet.size or packet.pts is None:
            return False
        time, times = _seconds(packet), self._times
        if time >= times[-1]:
            return False
        # The latest time that it can be the frame of: for earlier ones another frame lies before it as well.
        place = bisect_right(self.wanted, time - self.start + SLACK + _ROUNDING) - 1
        if place < 0:
            return True
        first = bisect_left(times, self.start + self.wanted[place] - SLACK + _ROUNDING)
        return first < len(times) and times[first] < time

    def _restarts(self, packet: Packet) -> bool:
        """Tells whether all frames from this packet on can be decoded without those before it.

        Containers also mark frames of H.264 from which the picture only recovers.
        """
        if not packet.is_keyframe or packet.is_corrupt:
            return False
        if self._name not in _SKIPPING:
            return True
        types = _unit_types(bytes(packet), self._length_bytes, self._name)
        kinds = _IDR if self._name == "h264" else _RANDOM_ACCESS
        return any(kind in kinds for kind in types)


def _seconds(packet: Packet) -> float:
    base = packet.time_base
    return float(cast(int, packet.pts)) * float(base.numerator) / float(base.denominator)


def _length_bytes(extra: bytes, name: str) -> int:
    """Returns how many bytes the length before each NAL unit has; 0: start codes separate them."""
    place = {"h264": 4, "hevc": 21}.get(name, 0)
    return (extra[place] & 3) + 1 if extra[:1] == b"\x01" and len(extra) > place else 0


def _unit_types(data: bytes, length_bytes: int, name: str) -> Iterator[int]:
    """Yields the types of the NAL units of a packet."""
    place = 0
    while True:
        if length_bytes:
            place += length_bytes
            size = int.from_bytes(data[place - length_bytes : place], "big")
        else:
            found = data.find(b"\x00\x00\x01", place)
            place, size = (found + 3 if found >= 0 else len(data)), 0
        if place >= len(data):
            return
        yield data[place] & 31 if name == "h264" else data[place] >> 1 & 63
        place += size
