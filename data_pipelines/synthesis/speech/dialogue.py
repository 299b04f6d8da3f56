"""Conversations that are spoken: questions heard, answers written and spoken piece by piece; loss on the answers.

A question keeps its pictures and films, and what was written of it follows them as speech, as in the released demos.
An answer is cut where the generating engine cuts its own. The system prompt stays written; where there is none, one
names the voice that answers.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from baichuan_omni_jax.config import VOICE, GenerationSettings, check_voice
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import (
    Source,
    conversation,
    heard_tag,
    join,
    spoken_answer,
    text_of,
    write_prompt,
)
from data_pipelines.documents.prompts import SPECIAL, Element, Picture, Reference, Text, Video, parse_prompt
from data_pipelines.documents.turns import cut_turns
from data_pipelines.errors import SampleError
from data_pipelines.media.location import find_media
from data_pipelines.synthesis.draft import Draft
from data_pipelines.synthesis.speech.speaking import (
    Speaker,
    SpeechSettings,
    add_speech_arguments,
    pieces_of,
    sentences_of,
    speech_settings,
)
from data_pipelines.synthesis.units import manifest_job
from data_pipelines.text.splitting import spoken_seconds
from data_pipelines.tokenizers.special_tokens import ASSISTANT

NAME = "dialogue"
TYPE = "dialogue"  # of the new documents
MOST = GenerationSettings().max_pieces  # stretches of speech of an answer


@dataclass(frozen=True)
class DialogueSettings:
    """Who speaks, and how the system prompt calls the voice that answers."""

    speech: SpeechSettings
    voice: str = VOICE


def add_arguments(parser: ArgumentParser) -> None:
    """The job's own options."""
    add_speech_arguments(parser)
    parser.add_argument("--voice", default=VOICE, help="as the system prompt names who answers (default %(default)s)")


def make_job(options: Namespace) -> Job:
    """The job of `options`. Raises ConfigError."""
    try:
        check_voice(options.voice)
    except ConfigError as error:
        raise ConfigError(f"--voice: {error}") from error
    settings = DialogueSettings(speech_settings(options), options.voice)
    return manifest_job(NAME, partial(speak_dialogue, settings=settings), options, str(settings))


def speak_dialogue(document: Document, draft: Draft, settings: DialogueSettings) -> None:
    """Adds the spoken form of a conversation.

    Raises SampleError: "has_sound" for one with sound (or token ids) in it; "no_turns" for what is no conversation;
    "no_text" for a turn without anything to speak; "too_long" for an answer of more pieces than an answer may have; as
    `Speaker` and `find_media`; "bad_prompt".
    """
    elements = parse_prompt(document.text)
    if any(not isinstance(element, Text | Picture | Video) for element in elements):
        raise SampleError("has_sound", "there is audio, or token ids, in it already")
    head, turns = cut_turns(elements)
    pairs = [_cut_turn(turn) for turn in turns]
    if not pairs or not all(text_of(answer) for _, answer in pairs):
        raise SampleError("no_turns", "it is no conversation of questions and their answers")
    if any(not spoken_seconds(text_of(side)) for pair in pairs for side in pair):
        raise SampleError("no_text", "a turn has nothing to speak")
    if any(not isinstance(element, Text) for _, answer in pairs for element in answer):
        raise SampleError("has_media", "an answer with pictures cannot be spoken")
    speaker = Speaker.of(settings.speech, document, draft, " ".join(text_of(side) for pair in pairs for side in pair))
    kept: dict[Reference, Reference] = {}
    spoken = [
        (_hear(question, document, draft, speaker, kept), _say(text_of(answer), speaker)) for question, answer in pairs
    ]
    draft.add(conversation(spoken, text_of(head), settings.voice), TYPE)


def _cut_turn(turn: Sequence[Element]) -> tuple[list[Element], list[Element]]:
    """The question and the answer of a turn, without the marks of roles."""
    sides: tuple[list[Element], list[Element]] = [], []
    answers = False
    for element in turn:
        if not isinstance(element, Text) or element.plain:
            sides[answers].append(element)
            continue
        for part in filter(None, SPECIAL.split(element.text)):
            answers = answers or part == ASSISTANT
            if not SPECIAL.fullmatch(part):
                sides[answers].append(replace(element, text=part))
    return sides


def _hear(
    question: Sequence[Element], document: Document, draft: Draft, speaker: Speaker, kept: dict[Reference, Reference]
) -> Source:
    """Pictures and films, each file kept once, then the words as speech, a clip for a few sentences."""
    media = [element for element in question if not isinstance(element, Text)]
    for element in media:
        if element.reference not in kept:
            kept[element.reference] = Reference(path=draft.link(find_media(element.reference, document.media)))
    shown = write_prompt(replace(element, reference=kept[element.reference]) for element in media)
    heard = (heard_tag(speaker.say(text)) for text in sentences_of(text_of(question), speaker.settings))
    return join([shown, *heard])


def _say(answer: str, speaker: Speaker) -> Source:
    pieces = pieces_of(answer, speaker.settings)
    if len(pieces) > MOST:
        raise SampleError("too_long", f"an answer has {len(pieces)} pieces to speak, not {MOST} at most")
    return spoken_answer(pieces, speaker.say)
