"""What a file holds, by its content: an image, an audio file or a video. Its name and ending decide nothing.

Browsers and telephones give one container to different things: a voice as `.webm` or `.mp4` without an image, a
JPEG as `.jfif`, a download without any ending.
"""

import mimetypes
from dataclasses import dataclass
from typing import IO, Literal, cast, get_args

from av.container import InputContainer
from av.stream import Disposition
from PIL import Image

from data_pipelines.errors import SampleError
from data_pipelines.media.audio import probe_audio
from data_pipelines.media.containers import opened
from data_pipelines.media.file_kinds import HEAD, kind_of
from data_pipelines.media.images import FORMATS
from data_pipelines.media.location import Media, kind_name

MediaKind = Literal["image", "audio", "video"]

_RATE = 16_000  # Hz at which an audio file is measured: any would do
# Brands of ISO media files that hold stills. FFmpeg would show them as videos of one frame.
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
# First bytes of formats that hold audio alone, so that what is wrong with such a file is said of an audio file.
_SOUND_HEADS = (b"fLaC", b"ID3", b"FORM", b".snd", b"caff", b"riff", b"NIST_1A", b"RF64", b"#!AMR")


@dataclass(frozen=True)
class MediaContent:
    """What kind a file is, and whether it has a track of audio (a video may lack one)."""

    kind: MediaKind
    has_audio: bool


def inspect_media(media: Media) -> MediaContent:
    """Opens the file as an image, a container and an audio file, in this order, and tells what it is.

    A cover on a song is no video, and neither is a track without a size. An animation (GIF, WebP) is an image.

    Raises SampleError: "unreadable_media" for a file that is none of them, is empty or cannot be opened;
    "too_big_media" beyond `limits`.
    """
    try:
        with media.open() as file:
            head = file.read(32)
    except OSError as error:
        raise SampleError("missing_file", f"{media.name} cannot be opened: {error.strerror}") from error
    if not head:
        raise SampleError("unreadable_media", f"{media.name} is empty")
    # Images first: FFmpeg takes a GIF or a HEIC for a video.
    if _is_still(media, head):
        return MediaContent("image", False)
    return _from_tracks(media) or _from_sound_file(media, head)


def _is_still(media: Media, head: bytes) -> bool:
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        return True
    try:
        with media.open() as file, Image.open(cast(IO[bytes], file), formats=FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # whoever reads it says that it is too large
    except Exception:  # on malformed files Pillow raises nearly anything
        return False


def _from_tracks(media: Media) -> MediaContent | None:
    """Judges by the tracks of the container; None where FFmpeg cannot open the file, or finds no track in it."""
    try:
        with opened(media, "video") as container:
            return _judge_tracks(container)
    except SampleError as error:
        if error.cause == "too_big_media":
            raise
        return None


def _judge_tracks(container: InputContainer) -> MediaContent | None:
    has_audio = len(container.streams.audio) > 0
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    # A recorder that was given no camera may still announce a track of images, without a size.
    shown = [s for s in moving if s.codec_context is None or (s.codec_context.width and s.codec_context.height)]
    if shown or (moving and not has_audio):
        return MediaContent("video", has_audio)
    return MediaContent("audio", True) if has_audio else None


def _from_sound_file(media: Media, head: bytes) -> MediaContent:
    """Tries formats of audio that are no containers of FFmpeg's here (AIFF and others)."""
    try:
        probe_audio(media, _RATE)
    except SampleError as error:
        if error.cause == "too_big_media" or head.startswith(_SOUND_HEADS) or head[8:12] == b"WAVE":
            raise
        raise SampleError("unreadable_media", _say_unknown(media)) from error
    return MediaContent("audio", True)


def _say_unknown(media: Media) -> str:
    """Names what the first bytes say, else what the ending says: it helps the owner to see what is wrong."""
    with media.open() as file:
        found = kind_of(file.read(HEAD))
    if found is not None and not found.read_as:
        return f"{media.name} is {found.name}, neither an image nor an audio file nor a video that can be read"
    if found is not None:
        return f"{media.name} begins as {found.name}, but cannot be read as one"
    claimed = (mimetypes.guess_type(media.name)[0] or "").partition("/")[0]
    if claimed in get_args(MediaKind):
        return (
            f"{media.name} is not a readable {kind_name(claimed)}: its content is that of no image, audio or video file"
        )
    return f"{media.name} is neither an image nor an audio file nor a video that can be read"
