"""Probing and decoding images, audio files and videos, and every way in which a file is refused."""

import gzip
import re
import struct
import zipfile

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.errors import SampleError
from data_pipelines.media import audio_track, videos
from data_pipelines.media import containers as limits
from data_pipelines.media.audio import clip_key, decode_audio, probe_audio
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.images import decode_image, probe_image
from data_pipelines.media.location import Media, MediaReference, find_media
from data_pipelines.media.videos import decode_frames, frame_times, probe_video, read_video
from tests.helpers.small_media import as_base64, media, tone, write_audio, write_image, write_video

RATE = 16000
KEY = {"encryption_key": "0f" * 16, "encryption_kid": "f0" * 16}


def refused(call, cause, message):
    with pytest.raises(SampleError, match=message) as caught:
        call()
    assert caught.value.cause == cause


class TestPaths:
    def test_inside_the_root(self, tmp_path):
        write_image(tmp_path / "a.png", 20, 30)
        (tmp_path / "sub").mkdir()
        for path in ("a.png", "sub/../a.png", str(tmp_path / "a.png")):
            assert find_media(MediaReference(path=path), tmp_path).path == (tmp_path / "a.png").resolve()

    def test_base64_media_decode(self, tmp_path):
        data = as_base64(write_image(tmp_path / "a.png", 20, 30))
        for text in (data, "data:image/png;base64," + data):
            found = find_media(MediaReference(base64=text), tmp_path)
            assert probe_image(found) == (20, 30)
            assert found.content_hash() == media(tmp_path / "a.png").content_hash()
        sound = find_media(MediaReference(base64=as_base64(write_audio(tmp_path / "a.wav", 0.5))), tmp_path)
        assert len(decode_audio(sound, probe_audio(sound, RATE), RATE)) == 8000
        video = find_media(MediaReference(base64=as_base64(write_video(tmp_path / "a.mp4", 2))), tmp_path)
        assert len(decode_frames(video, probe_video(video, 1.0, 8).times)) == 2

    def test_outside_the_root(self, tmp_path):
        root = tmp_path / "root"
        root.mkdir()
        outside = write_image(tmp_path / "a.png", 20, 30)
        (root / "link.png").symlink_to(outside)
        for path in ("../a.png", str(outside), "link.png", "../missing.png", "../root-2/a.png"):
            refused(lambda path=path: find_media(MediaReference(path=path), root), "outside_root", "lies outside")

    def test_missing(self, tmp_path):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for path in ("no.png", ".", "loop", "n" * 5000, "null\0byte"):
            refused(
                lambda path=path: find_media(MediaReference(path=path), tmp_path),
                "missing_file",
                "does not exist|no usable path|is a folder",
            )

    def test_bad_base64(self, tmp_path):
        refused(lambda: find_media(MediaReference(base64="???"), tmp_path), "unreadable_media", "base64")


class TestOtherFiles:
    def test_archives_and_encrypted_files_are_named(self, tmp_path):
        """By what they are, whatever their name claims."""
        names = {"a.zip": "a zip archive", "b.gz": "a gzip file", "c.pdf": "a PDF file", "d.enc": "an encrypted file"}
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.png", b"image")
        (tmp_path / "b.gz").write_bytes(gzip.compress(b"image"))
        (tmp_path / "c.pdf").write_bytes(b"%PDF-1.7 /Encrypt")
        (tmp_path / "d.enc").write_bytes(b"Salted__" + bytes(range(200)))
        for name, what in names.items():
            data = (tmp_path / name).read_bytes()
            for probe, suffix in ((probe_image, "jpg"), (as_audio, "mp3"), (as_video, "mp4")):
                found = Media(f"x.{suffix}", None, data)
                refused(lambda probe=probe, found=found: probe(found), "unreadable_media", f"x.{suffix} .*it is {what}")


def as_audio(found):
    return probe_audio(found, RATE)


def as_video(found):
    return probe_video(found, 1.0, 8)


def _at(place, magic):
    return bytes(place) + magic + bytes(600 - place)


class TestKindsOfFiles:
    """First bytes as the formats' own definitions have them."""

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b"", "an empty file"),
            (bytes(600), "a file of zeros"),
            (_at(0, b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a"), "a JPEG XL image"),
            (_at(0, b"\xff\x0a"), "a JPEG XL image"),
            (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
            (b"<svg width='1'/>", "an SVG drawing"),
            (_at(0, b"II*\x00\x10\x00\x00\x00CR\x02\x00"), "a raw image of a camera (CR2)"),
            (_at(0, b"FUJIFILMCCD-RAW "), "a raw image of a camera (RAF)"),
            (_at(0, b"\x00\x00\x00\x18ftypcrx "), "a raw image of a camera (CR3)"),
            (_at(128, b"DICM"), "a DICOM image"),
            (_at(257, b"ustar\x0000"), "a tar archive"),
            (_at(0, b"MThd\x00\x00\x00\x06"), "a MIDI file, notes without audio"),
            (_at(0, b"MAC \x96\x0f"), "a Monkey's Audio file"),
            (_at(0, b"wvpk"), "a WavPack audio file"),
            (_at(0, b"\x02#!SILK_V3"), "a SILK audio file"),
            (_at(0, b".RMF\x00\x00"), "a RealMedia file"),
            (_at(0, b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"), "what macOS keeps beside a file"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a pointer to a file in Git LFS"),
            (b"/annex/objects/SHA256E-s5--00.png\n", "a pointer to a file in git-annex"),
            (b"\n<!DOCTYPE html><html><title>404</title>", "a page of HTML"),
            (b"<html><body>Forbidden</body></html>", "a page of HTML"),
            (b'{"error": "not found"}', "a text of JSON"),
            ("Access denied. 没有权限。".encode()[:-1], "a text"),
            ("a".encode("utf-16"), "a text in UTF-16"),
            (b"#EXTM3U\n#EXTINF:1\n", "a play list"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_no_decoder_reads_is_named(self, data, what):
        for name, probe in (("x.jpg", probe_image), ("x.mp3", as_audio), ("x.mp4", as_video)):
            found = Media(name, None, data)
            refused(lambda probe=probe, found=found: probe(found), "unreadable_media", re.escape(f"it is {what}"))

    def test_media_of_another_kind_are_named(self, tmp_path):
        write_image(tmp_path / "a.png", 40, 60).rename(tmp_path / "a.mp3")
        refused(
            lambda: as_audio(media(tmp_path / "a.mp3")),
            "unreadable_media",
            "a.mp3 is not a readable audio file: it is a PNG image$",
        )
        write_audio(tmp_path / "s.flac", 1).rename(tmp_path / "s.png")
        refused(
            lambda: probe_image(media(tmp_path / "s.png")),
            "unreadable_media",
            "s.png is not a readable image: it is a FLAC audio file$",
        )

    def test_no_path_and_no_python_object_is_told(self, tmp_path):
        """Whatever holds the bytes: a file, or memory."""
        folder = tmp_path / "some where"
        folder.mkdir()
        heads = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x24\0\0\0WAVEfmt ", b"fLaC", b"\0\0\0\x18ftypisom"]
        messages = []
        for number, head in enumerate([*heads, b"ID3", b"GIF89a", b"\x1a\x45\xdf\xa3", bytes(range(1, 200)), b"OggS"]):
            path = folder / f"{number}.bin"
            path.write_bytes(head + bytes(range(256)) * 4)
            for found in (media(path), Media(path.name, None, path.read_bytes())):
                for probe in (probe_image, as_audio, as_video):
                    try:
                        probe(found)
                    except SampleError as error:
                        messages.append(str(error))
        assert len(messages) > 45, "a header alone may pass for an image"
        for message in messages:
            assert re.match(r"\d\.bin is not a readable ", message)
            assert not re.search(r"<\w|object at|0x[0-9a-f]{6}|PosixPath|b'|/|\n", message), message

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(5, "Input/output error", "/a b/c.png"), "Input/output error"),
            (ValueError("cannot read <_io.BufferedReader name='/a b/c.png'>"), "cannot read"),
            (OSError("error -2 in <_io.BytesIO object at 0x7fa0b1c2>: no data"), "error -2 in: no data"),
            (ValueError("bad file PosixPath('/a/b c.wav')"), "bad file"),
            (ValueError("'/a/b c.wav' ends early"), "ends early"),
            (SyntaxError("broken PNG file (chunk b'\\x00\\'')"), "broken PNG file (chunk )"),
            (ValueError("3/4 of its frames"), "3/4 of its frames"),
            (KeyError(282), "its content is damaged"),
            (TypeError("'NoneType' object is not subscriptable"), "its content is damaged"),
            (struct.error("unpack requires a buffer of 4 bytes"), "its content is damaged"),
            (EOFError(), "its content is damaged"),
            (MemoryError(), "it takes more memory than there is"),
        ],
    )
    def test_reasons(self, error, reason):
        assert plain_reason(error) == reason


class TestImages:
    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.gif"])
    def test_probe_is_the_decoded_size(self, tmp_path, name):
        path = write_image(tmp_path / name, 40, 30)
        assert probe_image(media(path)) == decode_image(media(path)).shape[:2] == (40, 30)

    def test_every_mode_becomes_rgb(self, tmp_path):
        for mode in ("L", "LA", "RGBA", "P", "1", "I;16"):
            path = tmp_path / f"{mode.replace(';', '')}.png"
            Image.new(mode, (30, 20)).save(path)
            assert decode_image(media(path)).shape == (20, 30, 3)

    def test_sixteen_bits_are_scaled(self, tmp_path):
        values = np.full((20, 20), 0x8000, np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        assert np.unique(decode_image(media(tmp_path / "a.png"))).tolist() == [128]

    def test_sizes_that_are_refused(self, tmp_path):
        for height, width, message in ((16, 16, "at most 256 pixels"), (2, 402, "aspect ratio exceeds 200")):
            path = write_image(tmp_path / f"{width}.png", height, width)
            refused(lambda path=path: probe_image(media(path)), "unreadable_media", message)
        assert probe_image(media(write_image(tmp_path / "ok.png", 2, 400))) == (2, 400)

    def test_too_big(self, tmp_path, monkeypatch):
        path = write_image(tmp_path / "large.png", 100, 100)
        monkeypatch.setattr(limits, "MAX_PIXELS", 9999)
        refused(
            lambda: probe_image(media(path)), "too_big_media", "large.png has 10000 pixels .100x100., more than 9999"
        )
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        refused(lambda: decode_image(media(path)), "too_big_media", "large.png .* decompression bomb")
        monkeypatch.setitem(limits.MAX_BYTES, "image", 1000)
        refused(lambda: probe_image(media(path)), "too_big_media", "large.png has [0-9]+ bytes of one image")

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.jpg").write_text("not an image")
        (tmp_path / "empty.png").touch()
        write_audio(tmp_path / "audio.wav", 1).rename(tmp_path / "audio.png")
        for name in ("text.jpg", "empty.png", "audio.png"):
            refused(lambda name=name: probe_image(media(tmp_path / name)), "unreadable_media", f"{name} is not a read")

    @pytest.mark.parametrize("name", ["a.png", "a.jpg"])
    def test_truncated(self, tmp_path, name):
        path = write_image(tmp_path / name, 80, 80)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused(lambda: decode_image(media(path)), "unreadable_media", "is not a readable image")

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
    def test_a_jpeg_may_lack_its_end_mark_alone(self, tmp_path, options):
        """Two bytes, or the second of them, behind pixels that are all there; a little more is a part of them."""
        path = write_image(tmp_path / "a.jpg", 40, 60, **options)
        whole, data = decode_image(media(path)), path.read_bytes()
        assert data[-2:] == b"\xff\xd9"
        for cut in (data[:-2], data[:-1]):
            np.testing.assert_array_equal(decode_image(Media("a.jpg", None, cut)), whole)
        for lost in (6, 40, len(data) // 2):
            refused(lambda lost=lost: decode_image(Media("a.jpg", None, data[:-lost])), "unreadable_media", "a.jpg")


class TestAudioFiles:
    @pytest.mark.parametrize(
        ("name", "rate"), [("a.wav", 16000), ("a.flac", 22050), ("a.ogg", 48000), ("a.mp3", 44100)]
    )
    def test_probe_is_the_decoded_length(self, tmp_path, name, rate):
        found = media(write_audio(tmp_path / name, 1.5, rate))
        samples = probe_audio(found, RATE)
        assert abs(samples - 24000) < 0.1 * RATE
        wave = decode_audio(found, samples, RATE)
        assert (wave.dtype, wave.shape) == (np.float32, (samples,))
        expected = tone(samples / RATE)[2000:-3000]
        assert np.abs(np.fft.rfft(wave[2000:-3000])).argmax() == np.abs(np.fft.rfft(expected)).argmax()

    def test_int16_is_divided_by_32768(self, tmp_path):
        values = np.arange(-3000, 3000, dtype=np.int16)
        soundfile.write(tmp_path / "a.wav", values, RATE)
        np.testing.assert_array_equal(decode_audio(media(tmp_path / "a.wav"), 6000, RATE), values / np.float32(32768))

    def test_channels_are_averaged(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", np.stack([tone(1), -0.5 * tone(1)], axis=1), RATE)
        np.testing.assert_allclose(decode_audio(media(tmp_path / "a.wav"), RATE, RATE), 0.25 * tone(1), atol=1e-4)

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
    def test_the_track_of_a_video(self, tmp_path, name):
        found = media(write_video(tmp_path / name, 3, audio=2))
        samples = probe_audio(found, RATE)
        assert abs(samples - 2 * RATE) < 0.1 * RATE
        wave = decode_audio(found, samples, RATE)
        assert len(wave) == samples
        assert 0.3 < np.abs(wave[RATE // 2 : RATE]).max() < 0.7

    def test_another_length_than_measured(self, tmp_path):
        found = media(write_audio(tmp_path / "a.wav", 1))
        assert len(decode_audio(found, RATE + 1000, RATE)) == RATE + 1000
        refused(lambda: decode_audio(found, RATE - 1601, RATE), "changed", "decodes to 16000 samples")

    def test_not_a_number(self, tmp_path):
        wave = tone(1)
        wave[100] = np.nan
        soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
        found = media(tmp_path / "a.wav")
        refused(lambda: decode_audio(found, probe_audio(found, RATE), RATE), "unreadable_media", "not finite")
        soundfile.write(tmp_path / "a.wav", 32768 * tone(1), RATE, subtype="FLOAT")
        refused(lambda: decode_audio(found, RATE, RATE), "unreadable_media", "of 1.64e[+]04, where full scale is 1")

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.wav").write_text("not an audio file, but long enough to look like one " * 100)
        (tmp_path / "text.txt").write_text("plain text " * 1000)
        (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1\n{write_audio(tmp_path / 'a.wav', 1)}\n")
        (tmp_path / "empty.wav").touch()
        write_image(tmp_path / "image.png", 60, 60).rename(tmp_path / "image.mp3")
        write_video(tmp_path / "mute.mp4", 1)
        soundfile.write(tmp_path / "nothing.wav", np.zeros(0, np.float32), RATE)
        names = ("text.wav", "text.txt", "list.m3u8", "empty.wav", "image.mp3", "mute.mp4", "nothing.wav")
        for name in names:
            refused(lambda name=name: probe_audio(media(tmp_path / name), RATE), "unreadable_media", name)

    def test_truncated(self, tmp_path):
        path = write_audio(tmp_path / "a.wav", 1)
        path.write_bytes(path.read_bytes()[:10000])
        refused(lambda: probe_audio(media(path), RATE), "unreadable_media", "truncated: 10000 of 32044 bytes")
        path = write_audio(tmp_path / "a.flac", 2)
        samples = probe_audio(media(path), RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        refused(lambda: decode_audio(media(path), samples, RATE), "unreadable_media", "a.flac")

    def test_too_big(self, tmp_path, monkeypatch):
        soundfile.write(tmp_path / "a.wav", np.zeros(7201, np.int16), 1)
        refused(lambda: probe_audio(media(tmp_path / "a.wav"), RATE), "too_big_media", "7201 seconds of audio")
        soundfile.write(tmp_path / "many.wav", np.zeros((10, 33), np.int16), RATE)
        refused(lambda: probe_audio(media(tmp_path / "many.wav"), RATE), "too_big_media", "33 channels")
        film, song = media(write_video(tmp_path / "a.mp4", 2, audio=2)), media(write_audio(tmp_path / "a.flac", 2))
        monkeypatch.setattr(limits, "MAX_AUDIO_SECONDS", 1)
        for found in (film, song):
            refused(lambda found=found: probe_audio(found, RATE), "too_big_media", "seconds of audio, more than 1")
        monkeypatch.undo()
        monkeypatch.setattr(audio_track, "MAX_AUDIO_SAMPLES", 10000)  # as if the header had claimed less
        for found in (film, song):
            refused(lambda found=found: decode_audio(found, 32000, RATE), "too_big_media", "more than 10000 samples")
        monkeypatch.setitem(limits.MAX_BYTES, "audio", 1000)
        refused(lambda: probe_audio(song, RATE), "too_big_media", "bytes of one audio")

    def test_silence(self, tmp_path):
        for name, loudest in (("zeros.wav", 0), ("dither.wav", 1), ("a.flac", 1)):
            wave = np.zeros(RATE, np.int16)
            wave[100] = -loudest
            soundfile.write(tmp_path / name, wave, RATE)
            refused(
                lambda name=name: decode_audio(media(tmp_path / name), RATE, RATE), "silent_audio", f"{name} is sil"
            )
        wave[100] = -2
        soundfile.write(tmp_path / "quiet.wav", wave, RATE)
        assert decode_audio(media(tmp_path / "quiet.wav"), RATE, RATE).min() < 0

    def test_keys_follow_the_content(self, tmp_path):
        path = write_audio(tmp_path / "a.wav", 1)
        first = clip_key(media(path), 0)
        assert first == (media(path).content_hash(), 0) != clip_key(media(path), 1)
        assert clip_key(Media("copy", None, path.read_bytes()), 0) == first
        write_audio(path, 2)
        assert clip_key(media(path), 0) != first


class TestVideos:
    def test_frame_times(self):
        assert frame_times(3.0, 1.0, 32) == (0.0, 1.0, 2.0)
        assert frame_times(3.04, 1.0, 32) == (0.0, 1.0, 2.0, 3.0)
        assert frame_times(0.0, 1.0, 32) == (0.0,)
        assert frame_times(2.0, 2.0, 32) == (0.0, 0.5, 1.0, 1.5)
        many = frame_times(1000.0, 1.0, 32)
        assert (len(many), many[0], many[-1]) == (32, 0.0, 999.0)
        assert frame_times(1000.0, 1.0, 1) == (0.0,)

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
    def test_one_frame_a_second(self, tmp_path, name):
        found = media(write_video(tmp_path / name, 4))
        probe = probe_video(found, 1.0, 32)
        assert (probe.height, probe.width, probe.times) == (64, 96, (0.0, 1.0, 2.0, 3.0))
        frames = decode_frames(found, probe.times)
        assert [frame.shape for frame in frames] == [(64, 96, 3)] * 4
        assert [round((frame.mean() - 20) / 10) for frame in frames] == [0, 1, 2, 3]

    def test_the_last_frame_stands_in_for_what_is_missing(self, tmp_path):
        found = media(write_video(tmp_path / "a.mp4", 2))
        frames = decode_frames(found, (0.0, 1.0, 1.95, 2.5))
        assert [round((frame.mean() - 20) / 10) for frame in frames] == [0, 1, 1, 1]

    @pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mkv", "a.avi", "a.ts"])
    def test_jumps_between_key_frames_change_no_pixel(self, tmp_path, name, monkeypatch):
        found = media(write_video(tmp_path / name, 60, changing=True))
        times = (0.0, 0.4, 5.0, 23.3, 29.0, 58.8)
        frames = decode_frames(found, times)
        monkeypatch.setattr(videos, "_JUMP", np.inf)
        for frame, expected in zip(frames, decode_frames(found, times), strict=True):
            np.testing.assert_array_equal(frame, expected)
        probe, frames = read_video(found, 1.0, 7)
        assert probe == probe_video(found, 1.0, 7)
        for frame, expected in zip(frames, decode_frames(found, probe.times), strict=True):
            np.testing.assert_array_equal(frame, expected)

    def test_jumps_decode_less(self, tmp_path, monkeypatch):
        found = media(write_video(tmp_path / "a.mp4", 60, changing=True))
        monkeypatch.setattr(limits, "MAX_DECODED_PIXELS", 150 * 64 * 96)  # half of its 300 frames
        assert len(decode_frames(found, (0.0, 55.0))) == 2
        refused(lambda: decode_frames(found, tuple(map(float, range(60)))), "too_big_media", "pixels to decode")

    def test_too_big(self, tmp_path, monkeypatch):
        film, stream = media(write_video(tmp_path / "a.mp4", 2)), media(write_video(tmp_path / "a.webm", 2))
        monkeypatch.setattr(limits, "MAX_PACKETS", 5)
        refused(lambda: probe_video(stream, 1.0, 8), "too_big_media", "a.webm has 6 packets")
        monkeypatch.setattr(limits, "MAX_VIDEO_SECONDS", 1)
        refused(lambda: probe_video(film, 1.0, 8), "too_big_media", "2 seconds of video")
        monkeypatch.setattr(limits, "MAX_FRAME_PIXELS", 1000)
        refused(lambda: probe_video(film, 1.0, 8), "too_big_media", "64x96")
        monkeypatch.setitem(limits.MAX_BYTES, "video", 1000)
        refused(lambda: probe_video(film, 1.0, 8), "too_big_media", "bytes of one video")

    def test_encrypted(self, tmp_path):
        """Its header is plain, its frames are not."""
        path = write_video(tmp_path / "a.mp4", 3, codec="libx264", encryption_scheme="cenc-aes-ctr", **KEY)
        found = media(path)
        refused(lambda: decode_frames(found, probe_video(found, 1.0, 8).times), "unreadable_media", "a.mp4")

    def test_a_longer_audio_track_adds_no_frames(self, tmp_path):
        for name in ("a.mp4", "a.webm"):
            assert len(probe_video(media(write_video(tmp_path / name, 2, audio=4)), 1.0, 32).times) == 2

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.mp4").write_text("not a video " * 100)
        (tmp_path / "empty.mp4").touch()
        write_image(tmp_path / "image.png", 60, 60)
        write_audio(tmp_path / "audio.mp3", 1, 44100)
        path = write_video(tmp_path / "cut.mp4", 3)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        write_video(tmp_path / "small.mp4", 1, height=16, width=16)
        for name in ("text.mp4", "empty.mp4", "image.png", "audio.mp3", "cut.mp4", "small.mp4"):
            refused(lambda name=name: probe_video(media(tmp_path / name), 1.0, 8), "unreadable_media", name)

    def test_truncated_after_its_header(self, tmp_path):
        path = write_video(tmp_path / "a.webm", 12)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        refused(lambda: probe_video(media(path), 1.0, 32), "unreadable_media", "truncated")
        path = write_video(tmp_path / "a.mp4", 12, audio=12, header_first=True)
        times = probe_video(media(path), 1.0, 32).times
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert probe_video(media(path), 1.0, 32).times == times
        refused(lambda: decode_frames(media(path), times), "unreadable_media", "a.mp4")
        samples = probe_audio(media(path), RATE)
        refused(lambda: decode_audio(media(path), samples, RATE), "unreadable_media", "a.mp4")

    def test_the_cover_of_a_song_is_no_video(self, tmp_path):
        cover = b"\0image/png\0\3\0" + write_image(tmp_path / "cover.png", 20, 20).read_bytes()
        frame = b"APIC" + struct.pack(">I", len(cover)) + b"\0\0" + cover
        size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
        song = write_audio(tmp_path / "a.mp3", 1, 44100).read_bytes()
        (tmp_path / "song.mp3").write_bytes(b"ID3\3\0\0" + size + frame + song)
        refused(lambda: probe_video(media(tmp_path / "song.mp3"), 1.0, 8), "unreadable_media", "no video track")
        assert probe_audio(media(tmp_path / "song.mp3"), RATE) > 0
