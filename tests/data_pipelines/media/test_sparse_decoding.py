"""Frames at times are those of a whole decode, whatever the codec's frame types, and fewer are decoded for them."""

from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.media import videos
from data_pipelines.media.sparse_decoding import SLACK
from data_pipelines.media.videos import decode_frames, read_video
from tests.helpers.small_media import media

RATE = 30
# Name, codec, options, the share of frames that are decoded for one a second at the most.
KINDS = {
    "second.mp4": ("libx264", {"g": "30", "bf": "3"}, 0.3),
    "two.mp4": ("libx264", {"g": "60", "bf": "3"}, 0.5),
    "one-group.mp4": ("libx264", {"g": "1000", "bf": "3"}, 0.8),
    "open.mkv": ("libx264", {"g": "30", "bf": "3", "x264-params": "open-gop=1"}, 0.8),
    "refresh.mkv": ("libx264", {"g": "30", "bf": "0", "x264-params": "intra-refresh=1"}, 1.0),
    "stream.ts": ("libx264", {"g": "45", "bf": "2"}, 0.6),
    "no-b.mp4": ("libx264", {"g": "60", "bf": "0"}, 0.7),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=60:bframes=4:log-level=none"}, 0.5),
    "hevc-layers.mp4": ("libx265", {"x265-params": "keyint=60:bframes=4:temporal-layers=1:log-level=none"}, 0.7),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}, 0.3),
    "av1.mkv": ("libsvtav1", {"g": "30", "preset": "13"}, 0.4),
    "old.mp4": ("mpeg4", {"g": "30", "bf": "2"}, 1.0),
    "old.avi": ("mpeg4", {"g": "30"}, 1.0),
}


def write(path, codec, options, steps):
    """A video whose frame `i` comes `steps[i]` frame times after the one before."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    random = np.random.default_rng(0)
    texture = random.integers(0, 255, (96 + len(steps), 128, 3), np.uint8)
    with av.open(str(path), "w") as out:
        track = out.add_stream(codec, rate=RATE, options=options)
        track.height, track.width, track.pix_fmt = 96, 128, "yuv420p"
        for number, place in enumerate(np.cumsum([0, *steps[1:]])):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[number : number + 96]), format="rgb24")
            frame.pts, frame.time_base = int(place), Fraction(1, RATE)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return path


def whole(path, wanted):
    """The frames by decoding all of them."""
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    start = frames[0][0]
    return [next((pixels for time, pixels in frames if time - start >= at - SLACK), frames[-1][1]) for at in wanted]


@pytest.fixture
def decoded(monkeypatch):
    """The pixels that each decoded frame brought the count to."""
    counts = []
    monkeypatch.setattr(videos, "check_decoded", lambda pixels, name: counts.append(pixels))
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_a_whole_decode(tmp_path, decoded, name):
    codec, options, share = KINDS[name]
    path = write(tmp_path / name, codec, options, [1] * 240)
    random = np.random.default_rng(1)
    for wanted in [tuple(map(float, range(8))), tuple(sorted(random.uniform(0, 9, 12))), (3.3,), (0.5, 7.9, 8.0, 20.0)]:
        decoded.clear()
        found = decode_frames(media(path), wanted)
        np.testing.assert_array_equal(found, whole(path, wanted))
        if wanted == tuple(range(8)):
            assert decoded[-1] <= share * 240 * 96 * 128


def test_frames_of_an_uneven_clock_are_those_of_a_whole_decode(tmp_path):
    random = np.random.default_rng(2)
    path = write(tmp_path / "a.mp4", "libx264", {"g": "25", "bf": "3"}, random.integers(1, 9, 120).tolist())
    for rate in (0.5, 1.0, 3.0):
        wanted = tuple(np.arange(0, 20, 1 / rate))
        np.testing.assert_array_equal(decode_frames(media(path), wanted), whole(path, wanted))


def test_a_false_mark_of_a_key_frame_costs_time_alone(tmp_path, decoded):
    """MP4 without its table of key frames calls every frame one."""
    path = write(tmp_path / "a.mp4", "libx264", {"g": "1000", "bf": "2"}, [1] * 240)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    wanted = (0.0, 2.5, 7.0)
    np.testing.assert_array_equal(decode_frames(media(path), wanted), whole(path, wanted))


def test_a_damaged_video_is_decoded_whole(tmp_path):
    path = write(tmp_path / "a.mkv", "libx264", {"g": "60", "bf": "2"}, [1] * 240)
    data = bytearray(path.read_bytes())
    place = len(data) // 2
    data[place : place + 300] = bytes(300)
    path.write_bytes(data)
    probe, frames = read_video(media(path), 1.0, 32)
    with av.open(str(path)) as container:
        assert len(list(frames)) == len(probe.times)
        assert container.streams.video[0].codec_context.name == "h264"
