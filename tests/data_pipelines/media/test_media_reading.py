"""Probing and decoding images, audio files and videos, and every way in which a file is refused."""

import struct

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.media import audio_track, videos
from data_pipelines.media import containers as limits
from data_pipelines.media.audio import clip_key, decode_audio, probe_audio
from data_pipelines.media.images import decode_image, probe_image
from data_pipelines.media.location import Media
from data_pipelines.media.videos import decode_frames, frame_times, probe_video, read_video
from tests.helpers.refusals import RATE, refused
from tests.helpers.small_media import media, tone, write_audio, write_image, write_video

KEY = {"encryption_key": "0f" * 16, "encryption_kid": "f0" * 16}


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
