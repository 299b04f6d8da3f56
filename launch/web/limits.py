"""What one turn of the page may hold, and the parts of a message that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.config import ConfigError, RequestError
from data_pipelines.document import SampleError
from data_pipelines.media import Media
from data_pipelines.sounds import probe_sound
from data_pipelines.videos import probe_video

# By the name's ending: what a browser sends as the type is that, too. No SVG: it can hold scripts.
ENDINGS = {
    "image": (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "audio": (".aac", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
    "video": (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one turn: files, megabytes (2^20 bytes) of each, seconds of each sound and video, characters of text."""

    files: int = 8
    megabytes: float = 32
    sound_seconds: float = 60
    video_seconds: float = 120
    characters: int = 8000

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ConfigError(f"limit {name} {value} must be positive")


def read_turn(text: str, files: Sequence[Path], limits: Limits) -> list[dict[str, Any]]:
    """Parts of a message (`OmniChat.reply`): the media by path, then the text.

    Raises RequestError: `bad_message` when there is nothing, or too much; `bad_media` for a file that is too large or
    long, or no picture, sound or video.
    """
    text = text.strip()
    if not text and not files:
        raise RequestError("bad_message", "there is nothing to answer: write, attach or say something first")
    if len(text) > limits.characters:
        raise RequestError("bad_message", f"the text has {len(text)} characters, more than {limits.characters}")
    if len(files) > limits.files:
        raise RequestError("bad_message", f"{len(files)} files are attached, more than {limits.files}")
    parts = [_read_file(path, limits) for path in files]
    return parts + ([{"type": "text", "text": text}] if text else [])


def _read_file(path: Path, limits: Limits) -> dict[str, Any]:
    kind = next((kind for kind, endings in ENDINGS.items() if path.suffix.lower() in endings), None)
    if kind is None:
        raise RequestError("bad_media", f"{path.name} is neither a picture nor a sound nor a video that can be read")
    size = path.stat().st_size / 2**20
    if size > limits.megabytes:
        raise RequestError("bad_media", f"{path.name} has {size:.1f} MB, more than {limits.megabytes:g}")
    if kind == "image":
        return {"type": kind, "path": str(path)}
    longest = limits.sound_seconds if kind == "audio" else limits.video_seconds
    try:
        seconds = _seconds(Media(path.name, path), kind)
    except SampleError as error:
        raise RequestError("bad_media", str(error)) from error
    if seconds > longest:
        raise RequestError("bad_media", f"{path.name} is {seconds:.0f} s long, more than {longest:g} s")
    return {"type": kind, "path": str(path)}


def _seconds(media: Media, kind: str) -> float:
    return probe_sound(media, 1000) / 1000 if kind == "audio" else probe_video(media, 1.0, 1).seconds
