"""The form of a conversation, in one place: chat, training documents and their synthesis all write it by this.

Turns follow each other without separators, each after the mark of its role, with no end mark. In a conversation that is
answered aloud `<audiotext_start_baichuan>` stands before each `<C_A>`, and a system prompt names the voice; in one that
is answered in text alone, neither:

    <B_SYS>请用【邻家女声】这个声音回答问题。<C_Q>...<audiotext_start_baichuan><C_A>Good.<audiogen_start_baichuan>...
    <C_Q>...<C_A>Good.

A conversation has a system prompt of its own or the voice's, never both: what a user wrote stays as it is.
"""

from typing import Literal

from baichuan_omni_jax.config import VOICE, check_voice
from data_pipelines.documents.prompts import AudioElement, Element, TextElement
from data_pipelines.tokenizers.special_tokens import ASSISTANT, AUDIOTEXT_START, SYSTEM, USER

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


def role_mark(role: Role, spoken: bool) -> str:
    """What stands before a turn, in a conversation that is answered aloud (`spoken`) or in text alone.

    >>> role_mark("assistant", spoken=True)
    '<audiotext_start_baichuan><C_A>'
    """
    if role == "assistant":
        return AUDIOTEXT_START + ASSISTANT if spoken else ASSISTANT
    return {"system": SYSTEM, "user": USER}[role]


def voice_prompt(voice: str = VOICE) -> str:
    """The system prompt of the released speech demos. Raises ConfigError for what is no name of a voice.

    >>> voice_prompt()
    '请用【邻家女声】这个声音回答问题。'
    """
    check_voice(voice)
    return f"请用【{voice}】这个声音回答问题。"


def opening_elements(system: bool, spoken: bool, voice: str = VOICE) -> list[Element]:
    """What stands before the first turn: the voice's system prompt, unless there is a `system` prompt already."""
    if system or not spoken:
        return []
    return [TextElement(role_mark("system", spoken)), TextElement(voice_prompt(voice), plain=True)]


def misses_marks(elements: list[Element]) -> bool:
    """Whether a conversation is answered aloud and does not say so before each answer."""
    marks = "".join(each.text for each in elements if isinstance(each, TextElement) and not each.plain)
    aloud = any(isinstance(each, AudioElement) and each.spoken for each in elements)
    return aloud and ASSISTANT in marks and marks.count(ASSISTANT) != marks.count(AUDIOTEXT_START + ASSISTANT)
