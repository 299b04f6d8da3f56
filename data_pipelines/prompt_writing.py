"""Writing source prompts: tags, turns, whole prompts from their elements (the inverse of `prompts.parse_prompt`)."""

import functools
import json
import re
from collections.abc import Iterable
from itertools import groupby

from data_pipelines import special_tokens as names
from data_pipelines.prompts import Element, Picture, Reference, Sound, Text, Tokens, Video, parse_prompt

_SPECIAL = re.compile("|".join(map(re.escape, sorted(names.SPECIAL_TOKENS, key=len, reverse=True))))


def _tag(kind: str, key: str, path: str) -> str:
    return f"<{kind}_start_baichuan>{json.dumps({key: path})}<{kind}_end_baichuan>"


image_tag = functools.partial(_tag, "img", "local")
video_tag = functools.partial(_tag, "video", "local")
heard_tag = functools.partial(_tag, "audio", "path")
spoken_tag = functools.partial(_tag, "audiogen", "path")


def trainable(text: str) -> str:
    """Marks text, or speech to be generated, as carrying loss."""
    return f"{names.TRAINABLE_START}{text}{names.TRAINABLE_END}"


def turn(question: str, answer: str, system: str = "") -> str:
    """A user's turn and the assistant's trainable answer, after an optional system prompt."""
    opening = f"{names.SYSTEM}{system}" if system else ""
    return f"{opening}{names.USER}{question}{names.ASSISTANT}{trainable(answer)}"


def write_prompt(elements: Iterable[Element]) -> str:
    """The prompt that `parse_prompt` reads as `elements`; frames of one video that stood in a list stand alone."""
    runs = groupby(elements, key=lambda element: getattr(element, "trainable", False))
    written = ((learnt, "".join(map(_write, run))) for learnt, run in runs)
    return "".join(trainable(text) if learnt else text for learnt, text in written)


def plain_text(prompt: str) -> str:
    """What a reader would read of a prompt: no media, no marks, a line end for each special token.

    Raises SampleError "bad_prompt".
    """
    text = "".join(element.text for element in parse_prompt(prompt) if isinstance(element, Text))
    return _SPECIAL.sub("\n", text).strip()


def _write(element: Element) -> str:
    if isinstance(element, Text):
        return element.text
    if isinstance(element, Picture):
        start, end = (names.FRAME_START, names.FRAME_END) if element.frame else (names.IMAGE_START, names.IMAGE_END)
        return start + _reference("local", element.reference) + end
    if isinstance(element, Video):
        return names.VIDEO_START + _reference("local", element.reference) + names.VIDEO_END
    if isinstance(element, Tokens):
        return names.TOKENS_START + _reference("path", element.reference) + names.TOKENS_END
    assert isinstance(element, Sound)
    if element.spoken:
        return names.AUDIOGEN_START + _reference("path", element.reference) + names.AUDIOGEN_END
    return names.AUDIO_START + _reference("path", element.reference) + names.AUDIO_END


def _reference(key: str, reference: Reference) -> str:
    return json.dumps({"base64": reference.base64} if reference.base64 else {key: reference.path})
