"""Messages of harnesses, their media in whatever form a data set has them, as those of chat (`OmniChat.reply`)."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from baichuan_omni_jax.errors import RequestError

# What a clip of a longer file is named by; files are read whole here.
_CLIPS = ("start_time", "end_time", "video_start", "video_end")


def chat_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages as chat takes them, media in the order in which they stand.

    >>> chat_messages([{"role": "user", "content": [{"type": "image", "url": "cat.jpg"}]}])
    [{'role': 'user', 'content': [{'type': 'image', 'path': 'cat.jpg'}]}]

    Args:
        messages: role and content: text, or parts `{"type": "text", "text"}` and `{"type": "image" | "audio" |
            "video", "url"}`, where `url` is a path, a data URL, bytes, a picture of Pillow, a list of them (frames), a
            waveform with its rate (`{"array", "sampling_rate"}`), or a decoder of the `datasets` library.

    Raises:
        RequestError: `bad_message`, `bad_media` for a form that is not known, a link, or a clip of a longer file.
    """
    return [{"role": message["role"], "content": _read_content(message["content"])} for message in messages]


def _read_content(content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "audio", "video"):
            if clip := [name for name in _CLIPS if part.get(name) is not None]:
                raise RequestError("bad_media", f"{clip[0]} of a {kind} asks for a part of it; files are read whole")
            parts += _read_media(kind, part["url"])
        else:
            raise RequestError(
                "bad_message", f"a message has a part of type {kind!r}; there are text, image, audio, video"
            )
    return parts


def _read_media(kind: str, value: Any) -> Iterator[dict[str, Any]]:
    """Yields the parts that a medium becomes: one, or an image a frame of a video that is given as pictures."""
    if isinstance(value, str | Path):
        # A link is refused where files are opened: nothing is fetched.
        yield {"type": kind, ("base64" if str(value)[:5].lower() == "data:" else "path"): str(value)}
    elif isinstance(value, bytes | bytearray):
        yield {"type": kind, "bytes": bytes(value)}
    elif isinstance(value, Image.Image):
        file = io.BytesIO()
        # Without loss, whatever it was read from.
        value.save(file, format="PNG")
        yield {"type": "image", "bytes": file.getvalue()}
    elif isinstance(value, list | tuple) and all(isinstance(frame, Image.Image) for frame in value):
        for frame in value:
            yield from _read_media("image", frame)
    elif (decode := getattr(value, "get_all_samples", None)) is not None:
        # torchcodec's decoder, which `datasets` gives for audio.
        samples = decode()
        yield {"type": "audio", "samples": np.asarray(samples.data).T, "rate": int(samples.sample_rate)}
    elif isinstance(value, Mapping):
        yield from _read_record(kind, value)
    else:
        raise RequestError("bad_media", f"{kind} is given as {type(value).__name__}, which is not known")


def _read_record(kind: str, value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the parts of a medium that a data set has as a record, of which the first field that is known counts."""
    if clip := [name for name in _CLIPS if value.get(name) is not None]:
        raise RequestError("bad_media", f"{clip[0]} of a {kind} asks for a part of it; files are read whole")
    if value.get("array") is not None:
        samples = np.asarray(value["array"])
        # Channels come first where there are few of them; here they come last.
        samples = samples.T if samples.ndim == 2 and samples.shape[0] < samples.shape[1] else samples
        yield {"type": "audio", "samples": samples, "rate": int(value["sampling_rate"])}
        return
    found = next((value[name] for name in ("bytes", "path", "url") if value.get(name)), None)
    if found is None:
        raise RequestError("bad_media", f"{kind} is given by {', '.join(value) or 'nothing'}, none of which is known")
    yield from _read_media(kind, found)
