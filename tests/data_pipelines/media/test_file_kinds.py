"""Files of every kind where media are expected: what they are called when they are refused."""

import gzip
import re
import struct
import zipfile

import pytest

from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.file_kinds import plain_reason
from data_pipelines.media.images import probe_image
from data_pipelines.media.location import Media, MediaReference, find_media
from data_pipelines.media.videos import decode_frames, probe_video
from tests.helpers.refusals import RATE, refused
from tests.helpers.small_media import as_base64, media, write_audio, write_image, write_video


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
