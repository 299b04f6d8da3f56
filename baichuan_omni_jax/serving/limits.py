"""Checks what one turn of the page holds, and makes the parts of a message of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError, RequestError
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio
from data_pipelines.media.images import probe_image
from data_pipelines.media.location import Media
from data_pipelines.media.media_kind import MediaContent, inspect_media
from data_pipelines.media.videos import probe_video

RATE = 16_000  # Hz at which audio is measured
LEAST = 0.1  # seconds: shorter audio may give no code frame


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
