"""Writing source prompts: the form of a conversation, tags, turns, whole prompts (the inverse of `parse_prompt`).

    turn(image_tag("cat.jpg") + question, answer)

The form of a conversation stands here alone: chat, training documents and their synthesis all write it by this. Turns
follow each other without separators, each after the mark of its role, with no end mark. In a conversation that is
answered in speech `<audiotext_start_baichuan>` stands before each `<C_A>`, and a system prompt names the voice; in one
that is answered in text alone, neither:

    <B_SYS>请用【邻家女声】这个声音回答问题。<C_Q>...<audiotext_start_baichuan><C_A>Good.<audiogen_start_baichuan>...
    <C_Q>...<C_A>Good.

A conversation has a system prompt of its own or the voice's, never both: what a user wrote stays as it is.

What the functions here give is `Source`. A plain `str` is text that somebody wrote, in which the name of a special
token is text: it is escaped where it meets a `Source`, and in the arguments of the functions. (f-strings and `"".join`
make plain text of everything: use `join`.)
"""

import random
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, SupportsIndex

from baichuan_omni_jax.config import VOICE, check_voice
from data_pipelines.documents.prompts import (
    SPECIAL,
    AudioElement,
    Element,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    escape,
    meet_in_a_name,
    parse_prompt,
    write_reference,
)
from data_pipelines.media.location import MediaReference
from data_pipelines.tokenizers import tokenizer as names
from data_pipelines.tokenizers.tokenizer import ASSISTANT, AUDIOTEXT_START, SYSTEM, USER

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
ASR_PROMPT = "将语音转录为文本:"  # as released, its colon included; the audio follows it

# Task prompts of new documents; the released one comes first.
TRANSCRIBE = {
    "zh": (ASR_PROMPT, "请把听到的话写下来：", "请转写这段语音："),
    "en": ("Transcribe the speech into text:", "Write down what you hear:", "What is said in this recording?"),
}
SPEAK_TEXT = {
    "zh": ("将文本转换为语音：", "请朗读下面的文字：", "请把这句话读出来："),
    "en": ("Convert the text into speech: ", "Read this aloud: ", "Say the following: "),
}


def role_mark(role: Role, spoken: bool) -> str:
    """Returns what stands before a turn, in a conversation that is answered in speech (`spoken`) or in text alone.

    >>> role_mark("assistant", spoken=True)
    '<audiotext_start_baichuan><C_A>'
    """
    if role == "assistant":
        return AUDIOTEXT_START + ASSISTANT if spoken else ASSISTANT
    return {"system": SYSTEM, "user": USER}[role]


def voice_prompt(voice: str = VOICE) -> str:
    """Returns the system prompt of the released speech demos. Raises ConfigError for what is no name of a voice.

    >>> voice_prompt()
    '请用【邻家女声】这个声音回答问题。'
    """
    check_voice(voice)
    return f"请用【{voice}】这个声音回答问题。"


def opening_elements(system: bool, spoken: bool, voice: str = VOICE) -> list[Element]:
    """Returns what stands before the first turn: the voice's system prompt, unless there is a `system` prompt
    already.
    """
    # A user's own system prompt stays as it is; without speech there is no voice to name.
    if system or not spoken:
        return []
    return [TextElement(role_mark("system", spoken)), TextElement(voice_prompt(voice), plain=True)]


def misses_marks(elements: list[Element]) -> bool:
    """Tells whether a conversation is answered in speech and does not say so before each answer."""
    # Escaped names are text: only real marks count.
    marks = "".join(each.text for each in elements if isinstance(each, TextElement) and not each.plain)
    spoken = any(isinstance(each, AudioElement) and each.spoken for each in elements)
    return spoken and ASSISTANT in marks and marks.count(ASSISTANT) != marks.count(AUDIOTEXT_START + ASSISTANT)


class Source(str):
    """Part of a source prompt. Added to plain text, or plain text to it, it is still one: the text is escaped."""

    __slots__ = ()

    def __add__(self, other: str) -> "Source":
        return join((self, other))

    def __radd__(self, other: str) -> "Source":
        return join((other, self))

    def __mul__(self, value: SupportsIndex) -> "Source":
        return join([self] * int(value))


def join(parts: Iterable[str]) -> Source:
    """Joins parts, plain text among them escaped; no name arises where two of them meet.

    >>> join(["<C_A>", Source("<C_A>"), "<C_", "A>"])
    '<<literal_omni>C_A><C_A><C_<literal_omni>A>'
    """
    # Pieces are checked where they meet: two harmless ones may make a name together.
    written = ""
    for part in parts:
        piece = str(part) if isinstance(part, Source) else escape(part)
        written += names.LITERAL + piece if meet_in_a_name(written, piece) else piece
    return Source(written)


def _tag(kind: str, key: str, path: str) -> Source:
    return Source(f"<{kind}_start_baichuan>{write_reference(key, MediaReference(path=path))}<{kind}_end_baichuan>")


def image_tag(path: str) -> Source:
    """Writes the tag of an image."""
    return _tag("img", "local", path)


def video_tag(path: str) -> Source:
    """Writes the tag of a video, of which frames are seen."""
    return _tag("video", "local", path)


def audio_tag(path: str) -> Source:
    """Writes the tag of audio that the model hears."""
    return _tag("audio", "path", path)


def speech_tag(path: str) -> Source:
    """Writes the tag of speech that the model generates."""
    return _tag("audiogen", "path", path)


def trainable(text: str) -> Source:
    """Marks text, or speech to be generated, as carrying loss."""
    return join((Source(names.TRAINABLE_START), text, Source(names.TRAINABLE_END)))


def turn(question: str, answer: str, system: str = "", voice: str = VOICE) -> Source:
    """Writes a conversation of one turn.

    Args:
        question: what the user asks: text, or a `Source` with media.
        answer: what the assistant answers, all of it trainable.
        system: a system prompt ("": none, or the voice's where the answer holds speech).
        voice: the voice that is named where the answer holds speech.

    Returns:
        The prompt; see `conversation`.
    """
    return conversation([(question, answer)], system, voice)


def conversation(turns: Sequence[tuple[str, str]], system: str = "", voice: str = VOICE) -> Source:
    """Writes questions of the user and trainable answers of the assistant, after an optional system prompt.

    Where an answer holds speech (`speech_tag`), the conversation has the form of those answered in speech: the
    mark before each answer and, unless there is a `system` prompt, that which names the `voice`.
    """
    # The form follows from the answers: with speech in one, all turns have the marks of speech.
    spoken = any(isinstance(answer, Source) and names.AUDIOGEN_START in answer for _, answer in turns)
    if spoken and not system:
        system = voice_prompt(voice)
    parts = [Source(role_mark("system", spoken)), system] if system else []
    for question, answer in turns:
        parts += [Source(role_mark("user", spoken)), question]
        parts += [Source(role_mark("assistant", spoken)), trainable(answer)]
    return join(parts)


def spoken_answer(pieces: Sequence[str], say: Callable[[str], str]) -> Source:
    """Writes pieces of text, each followed by its speech; `say` speaks one and returns the path."""
    return join(part for piece in pieces for part in (piece, speech_tag(say(piece))))


def write_prompt(elements: Iterable[Element]) -> Source:
    """Writes the prompt that `parse_prompt` reads as `elements`; frames of one video that stood in a list
    stand alone.
    """
    # Neighbors that train stand between one pair of marks.
    runs = groupby(elements, key=lambda element: getattr(element, "trainable", False))
    written = ((learned, join(map(_write, run))) for learned, run in runs)
    return join(trainable(text) if learned else text for learned, text in written)


def plain_text(prompt: str) -> str:
    """Returns what a reader would read of a prompt: no media, no marks, a line end for each special token.

    Raises SampleError "bad_prompt".
    """
    return text_of(parse_prompt(prompt))


def text_of(elements: Iterable[Element]) -> str:
    """Returns what a reader would read of these elements."""
    texts = (element for element in elements if isinstance(element, TextElement))
    return "".join(each.text if each.plain else SPECIAL.sub("\n", each.text) for each in texts).strip()


def _write(element: Element) -> str:
    # Plain text is escaped where it is joined; a `Source` is written as it stands.
    if isinstance(element, TextElement):
        return element.text if element.plain else Source(element.text)
    if isinstance(element, ImageElement):
        start, end = (names.FRAME_START, names.FRAME_END) if element.frame else (names.IMAGE_START, names.IMAGE_END)
        return Source(start + write_reference("local", element.reference) + end)
    if isinstance(element, VideoElement):
        return Source(names.VIDEO_START + write_reference("local", element.reference) + names.VIDEO_END)
    if isinstance(element, TokensElement):
        return Source(names.TOKENS_START + write_reference("path", element.reference) + names.TOKENS_END)
    assert isinstance(element, AudioElement)
    # Heard and generated audio differ in their marks alone.
    start, end = (names.AUDIO_START, names.AUDIO_END)
    if element.spoken:
        start, end = names.AUDIOGEN_START, names.AUDIOGEN_END
    return Source(start + write_reference("path", element.reference) + end)


def choose_prompt(prompts: dict[str, tuple[str, ...]], language: str, rng: random.Random) -> str:
    """Chooses a prompt in the language of the text; for a text in another one, in either."""
    return rng.choice(prompts.get(language) or [prompt for choices in prompts.values() for prompt in choices])
