"""What is asked of a task, as fields (of the command line or of a manifest's line), put to the chat."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from baichuan_omni_jax.config import GenerationConfig, SamplingConfig
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat import ChatStream, OmniChat
from data_pipelines.documents.prompt_writing import ASR_PROMPT
from data_pipelines.documents.token_ids import encode_ids

TASKS = {
    "chat": "answers a prompt, with pictures, sound and video",
    "asr": "writes down what is said in a recording",
    "tts": "reads the prompt aloud",
    "describe": "describes a picture or a video",
}
FIELDS = ("system", "prompt", "image", "audio", "video", "media", "messages", "tokens")
_MEDIA = ("image", "audio", "video")
_DESCRIBE = {"image": "Describe the picture.", "video": "Describe the video."}


def default_settings(task: str, speech: bool) -> GenerationConfig:
    """The released demos' settings; of several transcripts the likeliest is wanted."""
    settings = GenerationConfig(speech=speech)
    return GenerationConfig(text=SamplingConfig()) if task == "asr" else settings


def ask(
    chat: OmniChat, task: str, values: Mapping[str, Any], key: jax.Array | None = None, base: Path = Path()
) -> ChatStream:
    """Puts one question, of which `values` are the fields (`FIELDS`; media are paths, or lists of paths, from `base`).

    Media stand before the text, in the order of the fields; `media` is a list of `{"type", "path"}` of all kinds.

    Raises RequestError: fields that this task cannot use, and what `OmniChat.reply` raises.
    """
    if unknown := [field for field in values if field not in FIELDS]:
        raise RequestError("bad_message", f"there is no field {unknown[0]!r}; there are {', '.join(FIELDS)}")
    media = [_based(part, base) for part in _media(values)]
    kinds = [part["type"] for part in media]
    fields = [*(field for field in values if field not in (*_MEDIA, "media")), *kinds]
    if "tokens" in values:
        _only(fields, task, "tokens")
        return _ask_ids(chat, task, values, key)
    if "messages" in values:
        _only(fields, task, "messages")
        return _ask_messages(chat, task, values, key, base)
    if task == "tts":
        _only(fields, task, "prompt")
        return chat.speak(_text(values, "prompt"), key=key)
    if task == "asr":
        _only(fields, task, "prompt", "audio")
        if len(media) != 1:
            raise RequestError("bad_message", f"asr takes one recording (audio), not {len(media)}")
        return chat.complete([_part(_text(values, "prompt", ASR_PROMPT)), *media], key=key)
    seen = next((kind for kind in ("image", "video") if kind in kinds), None)
    if task == "describe" and not seen:
        raise RequestError("bad_message", "describe takes an image or a video")
    default = "" if media else None
    if task == "describe":
        default = _DESCRIBE[seen]
    return chat.reply(user_turn(values, media, default), key=key)


def user_turn(values: Mapping[str, Any], media: list[dict], default: str | None) -> list[dict]:
    """The messages of one turn: the system prompt, then media and text of the user (`default` where none is given)."""
    text, system = _text(values, "prompt", default), _text(values, "system", "")
    content = [*media, *([_part(text)] if text else [])]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


def _ask_messages(
    chat: OmniChat, task: str, values: Mapping[str, Any], key: jax.Array | None, base: Path
) -> ChatStream:
    messages = values["messages"]
    if task != "chat" or not isinstance(messages, list):
        raise RequestError("bad_message", "messages are a list, and for chat")
    return chat.reply([_from_base(message, base) for message in messages], key=key)


def _from_base(message: Any, base: Path) -> Any:
    """The message with media paths from `base`; what is wrong with it is for the processor to say."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    return message | {"content": [_based(part, base) for part in message["content"]]}


def _based(part: Any, base: Path) -> Any:
    usable = isinstance(part, dict) and isinstance(part.get("path"), str) and part["path"]
    return part | {"path": str(base / part["path"])} if usable else part


def _ask_ids(chat: OmniChat, task: str, values: Mapping[str, Any], key: jax.Array | None) -> ChatStream:
    config = chat.model.config
    prompt = encode_ids(values["tokens"], config)
    if task != "tts":
        return chat.answer_prompt(prompt, key=key)
    start = config.tokens.audiogen_start
    ids = values["tokens"]
    return chat.speak_prompt(prompt if ids[-1] == start else encode_ids([*ids, start], config), key=key)


def _only(given: Iterable[str], task: str, *fields: str) -> None:
    if superfluous := [field for field in given if field not in fields]:
        raise RequestError("bad_message", f"{task} with {' and '.join(fields)} cannot use {superfluous[0]}")


def _text(values: Mapping[str, Any], field: str, default: str | None = None) -> str:
    found = values.get(field, default)
    if not isinstance(found, str):
        raise RequestError("bad_message", f"{field} is missing" if found is None else f"{field} is no text")
    return found


def _media(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parts of all kinds, in the order in which the fields stand."""
    parts: list[dict[str, Any]] = []
    for field, found in values.items():
        if field in _MEDIA:
            parts += [{"type": field, "path": path} for path in (found if isinstance(found, list) else [found])]
        elif field == "media":
            if not isinstance(found, list) or not all(_is_media(part) for part in found):
                raise RequestError("bad_message", 'media is no list of {"type": "image" | "audio" | "video", "path"}')
            parts += found
    return parts


def _is_media(part: Any) -> bool:
    return isinstance(part, dict) and set(part) == {"type", "path"} and part["type"] in _MEDIA


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
