"""Checks what one turn of the page holds, and makes the parts of a message of it.

What a file is follows from its content; its name and ending decide nothing. Browsers and telephones give one container
to different things: a voice as `.webm` or `.mp4` without an image, a JPEG as `.jfif`, a download without any ending.
"""

import mimetypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

from av.container import InputContainer
from av.stream import Disposition
from PIL import Image

from baichuan_omni_jax.errors import ConfigError, RequestError
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.containers import opened
from data_pipelines.media.file_kinds import HEAD, kind_of
from data_pipelines.media.images import FORMATS, probe_image
from data_pipelines.media.location import Media, kind_name
from data_pipelines.media.videos import probe_video

MediaKind = Literal["image", "audio", "video"]

RATE = 16_000  # Hz at which audio is measured
LEAST = 0.1  # seconds: shorter audio may give no code frame

# Brands of ISO media files that hold stills. FFmpeg would show them as videos of one frame.
_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
# First bytes of formats that hold audio alone, so that what is wrong with such a file is said of an audio file.
_AUDIO_HEADS = (b"fLaC", b"ID3", b"FORM", b".snd", b"caff", b"riff", b"NIST_1A", b"RF64", b"#!AMR")


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
    return _from_tracks(media) or _from_audio_file(media, head)


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


def _from_audio_file(media: Media, head: bytes) -> MediaContent:
    """Tries formats of audio that are no containers of FFmpeg's here (AIFF and others)."""
    try:
        probe_audio(media, RATE)
    except SampleError as error:
        if error.cause == "too_big_media" or head.startswith(_AUDIO_HEADS) or head[8:12] == b"WAVE":
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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one turn: files, megabytes (2^20 bytes) of each, seconds of each audio file and video, characters of text."""

    files: int = 8
    megabytes: float = 32
    audio_seconds: float = 60
    video_seconds: float = 120
    characters: int = 8000

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"limit {name} {value} must be positive")


def read_turn(
    text: str,
    files: Sequence[Path],
    limits: Limits,
    *,
    takes_audio: bool = True,
    note: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Makes the parts of a message (`OmniChat.reply`): the media by path, then the text.

    What a file is follows from its content, not from its name. A video is followed by its own audio, `{"type":
    "audio"}` of the same path, as in the released demos; where that is left out, `note` gets a sentence that says why.

    Args:
        text: what the user wrote.
        files: what the user attached, in that order.
        limits: what is refused beyond them; the audio of a video beyond `audio_seconds` is left out instead.
        takes_audio: whether the checkpoint has the branches that encode a video's audio.
        note: takes sentences that the user should see.

    Raises:
        RequestError: `bad_message` when there is nothing, or too much; `bad_media` for a file that is too large or
            long, or no image, audio or video.
    """
    text = text.strip()
    if not text and not files:
        raise RequestError("bad_message", "there is nothing to answer: write, attach or say something first")
    if len(text) > limits.characters:
        raise RequestError("bad_message", f"the text has {len(text)} characters, more than {limits.characters}")
    if len(files) > limits.files:
        raise RequestError("bad_message", f"{len(files)} files are attached, more than {limits.files}")
    parts = [part for path in files for part in _read_file(path, limits, takes_audio, note)]
    return parts + ([{"type": "text", "text": text}] if text else [])


def _read_file(path: Path, limits: Limits, takes_audio: bool, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """The part of one file, or the two of a video with its audio."""
    size = path.stat().st_size / 2**20
    if size > limits.megabytes:
        raise RequestError("bad_media", f"{path.name} has {size:.1f} MB, more than {limits.megabytes:g}")
    # By its name alone: the path is the server's, and messages are shown to the user.
    media = Media(path.name, path)
    try:
        content = inspect_media(media)
        _check_length(media, content.kind, limits)
    except SampleError as error:
        raise RequestError("bad_media", str(error)) from error
    parts = [{"type": content.kind, "path": str(path)}]
    if content.kind == "video":
        if reason := _why_left_out(media, content, limits, takes_audio):
            note(f"The audio of {path.name} is left out: {reason}.")
        else:
            parts.append({"type": "audio", "path": str(path)})
    return parts


def _check_length(media: Media, kind: str, limits: Limits) -> None:
    """Raises RequestError for audio or video that is too long, SampleError for media that cannot be read."""
    if kind == "image":
        probe_image(media)
        return
    longest = limits.audio_seconds if kind == "audio" else limits.video_seconds
    seconds = probe_audio(media, RATE) / RATE if kind == "audio" else probe_video(media, 1.0, 1).seconds
    if seconds > longest:
        raise RequestError("bad_media", f"{media.name} is {seconds:.0f} s long, more than {longest:g} s")


def _why_left_out(media: Media, content: MediaContent, limits: Limits, takes_audio: bool) -> str:
    """Why a video's audio is not part of the message; "" when it is. Its frames are part of it in any case."""
    if not content.has_audio:
        return "there is no audio track"
    if not takes_audio:
        return "the checkpoint has no branches that encode audio"
    # From cheap to dear: headers, lengths, and only then every sample.
    try:
        samples = probe_audio(media, RATE)
        if samples / RATE > limits.audio_seconds:
            return f"it is {samples / RATE:.0f} s long, more than {limits.audio_seconds:g} s"
        if samples / RATE < LEAST:
            return "it is too short"
        decode_audio(media, samples, RATE)
    except SampleError as error:
        return "it is silent" if error.cause == "silent_audio" else str(error)
    return ""
