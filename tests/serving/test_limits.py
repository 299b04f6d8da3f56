"""A file is what its content is, whatever it is called."""

import struct
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.serving.limits import MediaContent, inspect_media
from data_pipelines.errors import SampleError
from tests.helpers.small_media import media, tone, write_audio, write_image, write_video

IMAGE, AUDIO = MediaContent("image", False), MediaContent("audio", True)
VIDEO, MUTE_VIDEO = MediaContent("video", True), MediaContent("video", False)


def write_voice(path: Path, codec: str, form: str) -> Path:
    """Half a second of audio alone in a container that may hold images too."""
    rate = 8000 if codec.startswith("amr") else 48000
    with av.open(str(path), "w", format=form) as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, rate // 2, 960):
            part = tone(0.5, rate)[None, start : start + 960]
            frame = av.AudioFrame.from_ndarray(part, format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path


def add_cover(path: Path, jpeg: bytes) -> Path:
    """An MP3 with a cover: an ID3v2.3 tag of one frame APIC (encoding, type of the image, its kind, its bytes)."""
    body = b"\0image/jpeg\0\x03\0" + jpeg
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    size = bytes((len(frame) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + frame + path.read_bytes())
    return path


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("voice.webm", "libopus", "webm"),
        ("voice.weba", "libopus", "webm"),
        ("voice.mp4", "aac", "mp4"),
        ("voice.3gp", "aac", "3gp"),
        ("voice.mov", "aac", "mov"),
        ("voice.mkv", "flac", "matroska"),
        ("voice", "aac", "mp4"),
        ("voice.png", "libopus", "ogg"),
    ],
)
def test_a_container_without_an_image_is_audio(tmp_path, name, codec, form):
    assert inspect_media(media(write_voice(tmp_path / name, codec, form))) == AUDIO


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.aiff", "audio"])
def test_formats_of_audio_alone(tmp_path, name):
    form = {"audio": "AIFF"}.get(name)
    assert inspect_media(media(write_audio(tmp_path / name, 0.3, format=form))) == AUDIO


def test_a_cover_does_not_make_a_song_a_video(tmp_path):
    write_image(tmp_path / "cover.jpg", 40, 40)
    song = add_cover(write_audio(tmp_path / "song.mp3", 0.5), (tmp_path / "cover.jpg").read_bytes())
    with av.open(str(song)) as container:
        assert container.streams.video, "the cover is there"
    assert inspect_media(media(song)) == AUDIO


@pytest.mark.parametrize(("name", "form"), [("a.jfif", "JPEG"), ("a", "PNG"), ("a.mp4", "WEBP"), ("a.txt", "BMP")])
def test_images(tmp_path, name, form):
    assert inspect_media(media(write_image(tmp_path / name, 30, 40, format=form))) == IMAGE


def test_an_animation_is_an_image(tmp_path):
    frames = [Image.fromarray(np.full((30, 40), level, np.uint8)) for level in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert inspect_media(media(tmp_path / "a.gif")) == IMAGE


def test_a_still_in_an_iso_file_is_an_image(tmp_path):
    """A box of its length, `ftyp`, the brand, a version and the brands it goes with (ISO 14496-12, 4.3)."""
    (tmp_path / "a.mp4").write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic")
    assert inspect_media(media(tmp_path / "a.mp4")) == IMAGE


def test_videos_with_and_without_audio(tmp_path):
    assert inspect_media(media(write_video(tmp_path / "a.mp4", 0.6, audio=0.5))) == VIDEO
    assert inspect_media(media(write_video(tmp_path / "a.webm", 0.6).rename(tmp_path / "video"))) == MUTE_VIDEO
    assert inspect_media(media(write_video(tmp_path / "a.avi", 0.6).rename(tmp_path / "a.jpg"))) == MUTE_VIDEO


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("notes.bin", b"only text", r"notes\.bin is a text, neither an image nor an audio file nor a video"),
        ("noise", bytes(range(256)) * 40, r"noise is neither an image nor an audio file nor a video"),
        ("video.mp4", bytes(range(256)) * 40, r"video\.mp4 is not a readable video: its content is that of no"),
        ("voice.wav", bytes(range(256)) * 40, r"voice\.wav is not a readable audio file"),
        ("scan.png", b"%PDF-1.7\n\xe2\xe3", r"scan\.png is a PDF file, neither an image nor an audio file nor a video"),
        ("song.mp3", b"wvpk" + bytes(200), r"song\.mp3 is a WavPack audio file, neither"),
        ("photo.jpg", b"\xff\x0a" + bytes(range(200)), r"photo\.jpg is a JPEG XL image, neither"),
        ("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(40), r"photo\.png begins as a PNG image, but cannot be read as one"),
        ("empty.png", b"", r"empty\.png is empty"),
        ("cut.aiff", b"FORM\0\0\1\0AIFFCOMM", r"cut\.aiff is not a readable audio file"),
    ],
)
def test_what_is_none_is_refused_by_name(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=sentence) as error:
        inspect_media(media(tmp_path / name))
    assert error.value.cause == "unreadable_media"


def test_an_archive_is_none(tmp_path):
    write_image(tmp_path / "a.png", 30, 40)
    with zipfile.ZipFile(tmp_path / "photos", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    with pytest.raises(SampleError, match="photos is a zip archive, neither an image nor an audio file nor a video"):
        inspect_media(media(tmp_path / "photos"))
