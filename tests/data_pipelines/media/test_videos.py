"""Videos upright, in their stream's colors, as long as they are; one damaged packet; which frames are chosen."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from data_pipelines.documents.document import Document
from data_pipelines.documents.prompts import ImageElement
from data_pipelines.documents.sequence import document_elements, thin_frames
from data_pipelines.errors import SampleError
from data_pipelines.media.containers import Damage, is_cut
from data_pipelines.media.location import Media
from data_pipelines.media.videos import decode_frames, frame_times, probe_video, read_video
from tests.helpers.small_media import media

ONE = 1 << 16
# Of MP4: (x, y) is shown at (a x + c y + x0, b x + d y + y0); the image is 96 wide and 64 high.
MATRICES = {
    "none": (ONE, 0, 0, 0, ONE, 0, 0, 0),
    "90": (0, ONE, 0, -ONE, 0, 0, 64, 0),
    "180": (-ONE, 0, 0, 0, -ONE, 0, 96, 64),
    "270": (0, -ONE, 0, ONE, 0, 0, 0, 96),
    "mirrored": (-ONE, 0, 0, 0, ONE, 0, 96, 0),
    "flipped": (ONE, 0, 0, 0, -ONE, 0, 0, 64),
    "transposed": (0, ONE, 0, ONE, 0, 0, 0, 0),
    "transverse": (0, -ONE, 0, -ONE, 0, 0, 64, 96),
}


def film(path, frames, rate=Fraction(5), codec="mpeg4", form="yuv420p", start=0, options=None, **container) -> Path:
    """RGB frames as a video of `codec` and pixel format `form`, its clock beginning `start` frames late."""
    with av.open(str(path), "w", options=container) as out:
        track = out.add_stream(codec, rate=rate, options=options or {})
        track.height, track.width, track.pix_fmt = *frames[0].shape[:2], form
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = start + number, 1 / rate
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
    return path


def flat(color, height=64, width=96):
    return np.full((height, width, len(np.atleast_1d(color))), color, np.uint8)


def grays(count):
    return [flat((20 * number % 240,) * 3) for number in range(count)]


def turn_track(path, matrix):
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    a, b, u, c, d, v, x, y = matrix
    data[place : place + 36] = struct.pack(">9i", a, b, u, c, d, v, x * ONE, y * ONE, 1 << 30)
    path.write_bytes(data)


class TestTurns:
    @pytest.mark.parametrize("name", MATRICES)
    def test_display_matrices(self, tmp_path, name):
        """Each corner's color is where the matrix puts it."""
        stored = flat((128, 128, 128))
        corners = {(0, 0): (255, 0, 0), (0, 95): (0, 255, 0), (63, 0): (0, 0, 255), (63, 95): (255, 255, 255)}
        for (row, column), color in corners.items():
            stored[max(0, row - 23) : row + 24, max(0, column - 23) : column + 24] = color
        path = film(tmp_path / "a.mp4", [stored] * 3, codec="mjpeg", form="yuvj444p")
        turn_track(path, MATRICES[name])
        a, b, _, c, d, _, x0, y0 = MATRICES[name]
        sides = (64, 96) if a else (96, 64)
        probe = probe_video(media(path), 1.0, 8)
        (seen,) = decode_frames(media(path), probe.times)
        assert seen.shape[:2] == (probe.height, probe.width) == sides
        for (row, column), color in corners.items():
            at = abs(a) * column // ONE, abs(c) * row // ONE, abs(b) * column // ONE, abs(d) * row // ONE
            x = np.sign(a) * at[0] + np.sign(c) * at[1] + x0
            y = np.sign(b) * at[2] + np.sign(d) * at[3] + y0
            x, y = min(max(x, 4), sides[1] - 5), min(max(y, 4), sides[0] - 5)
            assert np.abs(seen[y, x].astype(int) - color).max() < 40, (name, row, column)

    def test_pixels_that_are_wider_than_high_are_ignored(self, tmp_path):
        with av.open(str(tmp_path / "a.mp4"), "w") as out:
            track = out.add_stream("mpeg4", rate=5)
            track.height, track.width, track.pix_fmt = 64, 96, "yuv420p"
            track.codec_context.sample_aspect_ratio = Fraction(4, 3)
            for pixels in grays(3):
                out.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            out.mux(track.encode(None))
        probe = probe_video(media(tmp_path / "a.mp4"), 1.0, 8)
        assert (probe.height, probe.width) == (64, 96)


class TestColors:
    @pytest.mark.parametrize(
        ("name", "codec", "form"),
        [
            ("a.mkv", "ffv1", "yuv444p10le"),
            ("b.mkv", "ffv1", "yuv420p16le"),
            ("b.mp4", "libx264rgb", "rgb24"),
            ("d.mkv", "ffv1", "gbrp12le"),
            ("a.mov", "png", "rgb24"),
            ("b.mov", "png", "rgb48be"),
            ("a.avi", "mjpeg", "yuvj420p"),
            ("b.avi", "rawvideo", "bgr24"),
            ("a.mp4", "libx264", "yuv422p"),
        ],
    )
    def test_depths_and_forms(self, tmp_path, name, codec, form):
        """What is encoded by BT.601, the encoder's default, comes back."""
        color = (200, 100, 50)
        path = film(tmp_path / name, [flat(color)] * 2, codec=codec, form=form)
        (seen,) = decode_frames(media(path), (0.0,))
        assert np.abs(seen.astype(int) - color).max() <= 5

    @pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
    @pytest.mark.parametrize("full", [False, True])
    def test_the_matrix_and_range_of_the_stream(self, tmp_path, matrix, kr, kb, full):
        """Y'CbCr of the same numbers is another color by each: R = Y + 2 (1 - Kr) Cr, and so on."""
        luma, cb, cr = 120, 100, 170
        with av.open(str(tmp_path / "a.mkv"), "w") as out:
            track = out.add_stream("ffv1", rate=5)
            track.height, track.width, track.pix_fmt = 64, 96, "yuv444p"
            track.codec_context.colorspace, track.codec_context.color_range = matrix, 2 if full else 1
            planes = np.stack([np.full((64, 96), value, np.uint8) for value in (luma, cb, cr)])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            frame.colorspace, frame.color_range = matrix, 2 if full else 1
            out.mux(track.encode(frame))
            out.mux(track.encode(None))
        y, blue, red = (luma / 255, (cb - 128) / 255, (cr - 128) / 255)
        if not full:
            y, blue, red = ((luma - 16) / 219, (cb - 128) / 224, (cr - 128) / 224)
        r, b = y + 2 * (1 - kr) * red, y + 2 * (1 - kb) * blue
        g = (y - kr * r - kb * b) / (1 - kr - kb)
        (seen,) = decode_frames(media(tmp_path / "a.mkv"), (0.0,))
        assert np.abs(seen[30, 40] - 255 * np.array([r, g, b])).max() <= 2

    @pytest.mark.parametrize(
        ("name", "codec", "form"),
        [("a.mov", "qtrle", "argb"), ("b.mov", "png", "rgba"), ("a.webm", "libvpx-vp9", "yuva420p")],
    )
    def test_transparent_pixels_lie_over_white(self, tmp_path, name, codec, form):
        """200 * 0.25 + 255 * 0.75 = 241."""
        path = film(tmp_path / name, [flat((200, 100, 50, 64))] * 4, codec=codec, form=form)
        frames = decode_frames(media(path), (0.0, 0.4))
        for seen in frames:
            assert np.abs(seen.astype(int) - (241, 216, 204)).max() <= 4

    def test_gif_over_white(self, tmp_path):
        clear, dark = Image.new("RGBA", (96, 64), (0, 0, 0, 0)), Image.new("RGBA", (96, 64), (9, 9, 9, 255))
        clear.paste(dark.crop((0, 0, 48, 64)), (0, 0))
        clear.save(tmp_path / "a.gif", save_all=True, append_images=[dark], duration=1000)
        first = decode_frames(media(tmp_path / "a.gif"), (0.0,))[0]
        assert first[30, [10, 90]].tolist() == [[9, 9, 9], [255, 255, 255]]

    def test_colors_that_cannot_be_read_are_told(self, tmp_path):
        with av.open(str(tmp_path / "a.mkv"), "w") as out:
            track = out.add_stream("ffv1", rate=5)
            track.height, track.width, track.pix_fmt = 64, 96, "yuv444p"
            track.codec_context.colorspace = 8  # YCgCo
            out.mux(track.encode(av.VideoFrame.from_ndarray(flat((9, 9, 9)), format="rgb24")))
            out.mux(track.encode(None))
        with pytest.raises(SampleError, match=r"its colors \(yuv444p, matrix 8\) are not read"):
            decode_frames(media(tmp_path / "a.mkv"), (0.0,))


class TestLengths:
    """To 20 ms: frames by their rate, whatever the container promises."""

    @pytest.mark.parametrize(
        ("name", "codec", "options"),
        [
            ("a.mp4", "mpeg4", {}),
            ("b.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
            ("c.mp4", "mpeg4", {"movflags": "dash"}),
            ("a.mov", "mjpeg", {}),
            ("a.mkv", "mpeg4", {}),
            ("b.mkv", "mpeg4", {"live": "1"}),
            ("a.webm", "libvpx", {}),
            ("a.ts", "libx264", {}),
            ("a.flv", "flv", {}),
            ("b.flv", "flv", {"flvflags": "no_duration_filesize"}),
            ("a.avi", "mpeg4", {}),
            ("a.wmv", "wmv2", {}),
        ],
    )
    @pytest.mark.parametrize("start", [0, 500])
    def test_clocks_from_anywhere(self, tmp_path, name, codec, options, start):
        """7.4 s: 8 frames at one a second, the first from the first frame on."""
        form = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        late = start if Path(name).suffix != ".avi" else 0  # AVI counts frames: it has no clock
        path = film(tmp_path / name, grays(37), codec=codec, form=form, start=late, **options)
        probe = probe_video(media(path), 1.0, 32)
        assert abs(probe.seconds - 7.4) < 0.02
        assert probe.times == tuple(map(float, range(8)))
        for place, seen in enumerate(decode_frames(media(path), probe.times)):
            assert abs(float(seen.mean()) - 100 * place % 240) < 8, place

    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.flv", "a.avi"])
    def test_slides(self, tmp_path, name):
        """Four frames at 0.4 a second stay 2.5 s each."""
        path = film(tmp_path / name, grays(4), rate=Fraction(2, 5), codec="flv" if name == "a.flv" else "mpeg4")
        if name == "a.ts":
            path = film(path, grays(4), rate=Fraction(2, 5), codec="libx264")
        probe = probe_video(media(path), 1.0, 32)
        assert abs(probe.seconds - 10) < 0.02
        assert len(decode_frames(media(path), probe.times)) == 10

    def test_a_last_frame_that_stays(self, tmp_path):
        frames = [Image.new("RGB", (96, 64), (40 * number,) * 3) for number in range(6)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[100] * 5 + [3000])
        probe = probe_video(media(tmp_path / "a.gif"), 1.0, 32)
        assert abs(probe.seconds - 3.5) < 0.02
        assert [round(float(seen.mean())) for seen in decode_frames(media(tmp_path / "a.gif"), probe.times)] == [
            0,
            200,
            200,
            200,
        ]

    def test_a_header_that_promises_more_of_a_whole_file(self, tmp_path):
        """Matroska's Duration, a float after its name 0x4489, says 12 s of 2 s: the last frame stays."""
        path = film(tmp_path / "a.mkv", grays(10))
        data = bytearray(path.read_bytes())
        place = data.index(b"\x44\x89\x88") + 3
        assert struct.unpack(">d", data[place : place + 8])[0] == pytest.approx(2000)
        data[place : place + 8] = struct.pack(">d", 12000)
        path.write_bytes(data)
        assert abs(probe_video(media(path), 1.0, 32).seconds - 12) < 0.02
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(SampleError, match="truncated"):
            probe_video(media(path), 1.0, 32)

    @pytest.mark.parametrize(
        ("name", "codec", "options"),
        [
            ("a.mp4", "mpeg4", {"movflags": "faststart"}),
            ("b.mp4", "mpeg4", {}),
            ("a.mkv", "mpeg4", {}),
            ("a.avi", "mpeg4", {}),
            ("a.flv", "flv", {}),
            ("a.wmv", "wmv2", {}),
        ],
    )
    def test_cut_files_are_refused(self, tmp_path, name, codec, options):
        path = film(tmp_path / name, grays(60), codec=codec, **options)
        assert is_cut(media(path)) in (False, None)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(SampleError, match=name) as caught:
            decode_frames(media(path), probe_video(media(path), 1.0, 32).times)
        assert caught.value.cause == "unreadable_media"

    def test_a_video_cut_before_its_first_frame(self, tmp_path):
        path = film(tmp_path / "a.mp4", grays(20), codec="mpeg4", movflags="faststart")
        data = path.read_bytes()
        with pytest.raises(SampleError, match="the file is truncated: it holds no frame"):
            probe_video(Media("a.mp4", None, data[: data.index(b"mdat") + 8]), 1.0, 8)


def test_the_image_is_that_of_the_default_track(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        tracks = [container.add_stream("ffv1", rate=5) for _ in range(2)]
        for track in tracks:
            track.width, track.height, track.pix_fmt = 96, 64, "gray"
        tracks[0].disposition, tracks[1].disposition = Disposition(0), Disposition.default
        for track, level in zip(tracks, (20, 200), strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96), level, np.uint8), format="gray")
            container.mux(track.encode(frame))
            container.mux(track.encode(None))
    (frame,) = decode_frames(media(path), (0.0,))
    assert (frame == 200).all()


def damage_packets(path, numbers):
    """Zeros in the place of these packets of an MP4."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number in numbers:
        place, size = packets[number]
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    return len(packets)


class TestDamage:
    def test_one_damaged_packet_costs_its_frame(self, tmp_path):
        path = film(tmp_path / "a.mp4", grays(20), codec="mjpeg", form="yuvj420p")
        assert damage_packets(path, [5]) == 20
        damage = Damage()
        probe, frames = read_video(media(path), 5.0, 32, damage)
        seen = [round(float(frame.mean()) / 20) % 12 for frame in frames]
        assert len(probe.times) == 20
        # The frame after it stands in.
        assert seen == [0, 1, 2, 3, 4, 6, 6, *[number % 12 for number in range(7, 20)]]
        assert (damage.packets, damage.damaged) == (20, 1)

    def test_the_first_and_the_last(self, tmp_path):
        for number in (0, 19):
            path = film(tmp_path / "a.mp4", grays(20), codec="mjpeg", form="yuvj420p")
            damage_packets(path, [number])
            damage = Damage()
            assert len(list(read_video(media(path), 5.0, 32, damage)[1])) == 20
            assert damage.damaged == 1

    def test_more_than_a_quarter_is_too_much(self, tmp_path):
        path = film(tmp_path / "a.mp4", grays(20), codec="mjpeg", form="yuvj420p")
        damage_packets(path, range(4, 10))
        with pytest.raises(SampleError, match="6 of 20 packets are damaged"):
            decode_frames(media(path), (0.0, 1.0, 2.0, 3.8))
        damage_packets(path, range(20))
        with pytest.raises(SampleError, match="holds no frame"):
            probe_video(media(path), 1.0, 8)


class TestChoice:
    def test_a_file_s_frames_are_floored(self):
        for count in (33.0, 45.0, 100.0, 1000.0):
            expected = [float(int(place * (count - 1) / 31)) for place in range(31)] + [count - 1]
            assert frame_times(count, 1.0, 32) == tuple(expected)
        assert frame_times(32.0, 1.0, 32) == tuple(map(float, range(32)))

    def test_listed_frames(self):
        frame = '<videoframe_start_omni>{"path": "%d"}<videoframe_end_omni>'
        whole = "".join(frame % number for number in range(50))
        listed = f"<video_start_baichuan>{whole}<video_end_baichuan>"

        def kept(text, most=32, **part):
            elements = document_elements(Document("x", "", text, "x:1", {}, **part), most)
            return [int(each.reference.path) for each in elements if isinstance(each, ImageElement)]

        chosen = [int(place * 50 / 32) for place in range(32)]
        assert kept(listed) == kept(whole) == chosen
        assert kept(listed + listed) == chosen * 2
        assert kept(listed, max_frames=3) == [0, 16, 33]
        assert kept(listed, max_frames=40) == chosen
        assert kept(listed, most=0) == list(range(50))
        assert thin_frames([], 3) == []
