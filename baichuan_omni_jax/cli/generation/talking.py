"""Several turns at the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import soundfile

from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.generation.chat import Conversation, OmniChat

from .opening import say
from .report import describe, show

HELP = """/image FILE, /audio FILE, /video FILE: goes with the next line; /new: a new conversation; /quit: the end.
Ctrl-C stops an answer."""
_KINDS = ("image", "audio", "video")


def talk(chat: OmniChat, values: Mapping[str, Any], out: Path | None) -> None:
    """Reads lines until they end. What the flags gave goes with the first; speech goes to OUT-1.wav, OUT-2.wav, ..."""
    say(HELP)
    system = values.get("system", "")
    conversation, turns = Conversation(chat, system), 0
    media = list(values.get("media", []))
    line: str | None = values.get("prompt") or _read_line()
    while line is not None and line != "/quit":
        word, _, rest = line.partition(" ")
        if word == "/new":
            conversation, media = Conversation(chat, system), []
        elif word[:1] == "/" and word[1:] in _KINDS and rest.strip():
            media.append({"type": word[1:], "path": rest.strip()})
        elif word[:1] == "/":
            say(HELP)
        elif line or media:
            turns += 1
            content = [*media, *([{"type": "text", "text": line}] if line else [])]
            media = []
            _turn(conversation, content, out and out.with_stem(f"{out.stem}-{turns}"))
        line = _read_line()


def _turn(conversation: Conversation, content: list[dict], out: Path | None) -> None:
    try:
        answer = show(conversation.say(content))
    except RequestError as error:
        say(f"error: {error}")
        return
    if out and len(answer.samples):
        soundfile.write(out, answer.samples, answer.rate)
        say(f"{out}: {answer.audio_seconds:.1f} s at {answer.rate} Hz")
    say(describe(answer, conversation.chat.model))


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None
