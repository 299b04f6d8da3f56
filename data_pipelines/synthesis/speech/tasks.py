"""The five tasks that make speech documents from text: ASR, TTS, INTLV, ITTS and spoken dialogue.

    asr        prompt, audio, words               a sentence at a time; loss on the words
    tts        prompt, words, audio               a sentence at a time; loss on the audio
    intlv      audio_1 text_2 audio_3 text_4 ...  pieces heard and written in turns; loss on the text alone
    itts       text_1 audio_1 text_2 audio_2 ...  every piece written, then spoken; loss on all but the first text
    dialogue   questions heard, answers written and spoken piece by piece; loss on the answers

Texts are cut at punctuation (`spoken_text`). A dialogue's question keeps its images and videos, and its words follow
them as speech, as in the released demos; an answer is cut where the generating engine cuts its own.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from baichuan_omni_jax.config import VOICE, GenerationConfig, check_voice
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import (
    SPEAK_TEXT,
    TRANSCRIBE,
    Source,
    audio_tag,
    conversation,
    join,
    speech_tag,
    spoken_answer,
    text_of,
    trainable,
    write_prompt,
)
from data_pipelines.documents.prompts import SPECIAL, Element, ImageElement, TextElement, VideoElement, parse_prompt
from data_pipelines.documents.sequence import cut_turns
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference, find_media
from data_pipelines.synthesis.speech.speaking import (
    DocumentSpeaker,
    SpeechConfig,
    add_speech_arguments,
    pieces_of,
    sentences_of,
    speech_config,
    spoken_sentences,
    text_alone,
)
from data_pipelines.synthesis.units import Draft, SynthesisTask, manifest_job
from data_pipelines.text.spoken_text import spoken_seconds
from data_pipelines.tokenizers.tokenizer import ASSISTANT

MIN_PIECES = 3  # the least that `--pieces` may be: then no piece is ever left alone
MAX_ANSWER_PIECES = GenerationConfig().max_segments  # stretches of speech of an answer

# Writes the prompt of two or more pieces; the function it is given speaks one piece and returns the path.
PromptWriter = Callable[[Sequence[str], Callable[[str], str]], Source]


# --- ASR and TTS: one document a sentence ---


def transcribe(document: Document, draft: Draft, config: SpeechConfig) -> None:
    """Adds an ASR document for each sentence of a text. Raises SampleError as `spoken_sentences`."""
    for prompt, words, path in spoken_sentences(document, draft, config, TRANSCRIBE):
        draft.add(join([prompt, audio_tag(path), trainable(words)]), "asr")


def speak_sentence(document: Document, draft: Draft, config: SpeechConfig) -> None:
    """Adds a TTS document for each sentence of a text. Raises SampleError as `spoken_sentences`."""
    for prompt, words, path in spoken_sentences(document, draft, config, SPEAK_TEXT):
        draft.add(join([prompt + words, trainable(speech_tag(path))]), "tts")


def _sentence_job(options: Namespace, name: str, maker: Callable) -> Job:
    config = speech_config(options)
    return manifest_job(name, partial(maker, config=config), options, str(config))


# --- INTLV and ITTS: pieces of one text in turns ---


def write_intlv(pieces: Sequence[str], say: Callable[[str], str]) -> Source:
    """Writes the INTLV prompt of two or more pieces; `say` speaks one and returns the path.

    A last piece that nothing would follow is written behind the one before.
    """
    # Even pieces are heard, odd ones written.
    heard, written = list(pieces[::2]), list(pieces[1::2])
    if len(heard) > len(written):
        written[-1] += heard.pop()
    turns = zip(heard, written, strict=True)
    return join(audio_tag(say(first)) + trainable(second) for first, second in turns)


def write_itts(pieces: Sequence[str], say: Callable[[str], str]) -> Source:
    """Writes the ITTS prompt of one or more pieces; `say` speaks one and returns the path."""
    # The first text is given, as in plain TTS; from its speech on everything is learned.
    first, *others = pieces
    return join([first, trainable(speech_tag(say(first)) + spoken_answer(others, say))])


def alternate(document: Document, draft: Draft, write: PromptWriter, config: SpeechConfig, size: int) -> None:
    """Adds the documents of a text that alternate between speech and text.

    Args:
        document: text alone.
        draft: where the new documents and their speech go.
        write: `write_intlv` or `write_itts`.
        config: who speaks, and into what the text is cut.
        size: the most pieces of one document, at least `MIN_PIECES`.

    Raises:
        SampleError: "too_short" for a text of one piece, and as `text_alone` and `DocumentSpeaker`.
    """
    text = text_alone(document)
    pieces = pieces_of(text, config)
    # Before anything is spoken, which is what costs time.
    if len(pieces) < 2:
        raise SampleError("too_short", "it is one piece, so nothing would alternate")
    speaker = DocumentSpeaker.for_document(config, document, draft, text)
    for group in group_pieces(pieces, size):
        draft.add(write(group, speaker.say), draft.name)


def group_pieces(pieces: Sequence[str], size: int) -> list[Sequence[str]]:
    """Groups at most `size` (>= 3) pieces at a time, as evenly as can be, so that of two or more none is left alone.

    >>> group_pieces("abcdefg", 3)
    ['abc', 'de', 'fg']
    """
    # As few groups as can be, their bounds rounded up: sizes differ by one at most.
    count = -(-len(pieces) // size)
    bounds = [-(-len(pieces) * place // count) for place in range(count + 1)]
    return [pieces[start:end] for start, end in pairwise(bounds)]


def _add_alternating_arguments(parser: ArgumentParser) -> None:
    add_speech_arguments(parser)
    parser.add_argument("--pieces", metavar="N", type=int, default=32, help="at most, of a document (default 32)")


def _alternating_job(options: Namespace, name: str, write: PromptWriter) -> Job:
    config = speech_config(options)
    if options.pieces < MIN_PIECES:
        raise ConfigError(f"--pieces {options.pieces} must be at least {MIN_PIECES}")
    maker = partial(alternate, write=write, config=config, size=options.pieces)
    return manifest_job(name, maker, options, f"{config} {options.pieces}")


# --- Dialogue: questions heard, answers written and spoken ---


@dataclass(frozen=True)
class DialogueConfig:
    """Who speaks, and how the system prompt calls the voice that answers."""

    speech: SpeechConfig
    voice: str = VOICE


def _add_dialogue_arguments(parser: ArgumentParser) -> None:
    add_speech_arguments(parser)
    parser.add_argument("--voice", default=VOICE, help="as the system prompt names who answers (default %(default)s)")


def _dialogue_job(options: Namespace) -> Job:
    try:
        check_voice(options.voice)
    except ConfigError as error:
        raise ConfigError(f"--voice: {error}") from error
    config = DialogueConfig(speech_config(options), options.voice)
    return manifest_job("dialogue", partial(speak_dialogue, config=config), options, str(config))


def speak_dialogue(document: Document, draft: Draft, config: DialogueConfig) -> None:
    """Adds the spoken form of a conversation; the system prompt stays written, or one names the voice that answers.

    Raises SampleError: "has_sound" for one with audio (or token ids) in it; "no_turns" for what is no conversation;
    "no_text" for a turn without anything to speak; "too_long" for an answer of more pieces than an answer may have; as
    `DocumentSpeaker` and `find_media`; "bad_prompt".
    """
    # Refuse what cannot be spoken before any speech is made: a clip costs a second.
    elements = parse_prompt(document.text)
    if any(not isinstance(element, TextElement | ImageElement | VideoElement) for element in elements):
        raise SampleError("has_sound", "there is audio, or token ids, in it already")
    head, turns = cut_turns(elements)
    pairs = [_cut_turn(turn) for turn in turns]
    if not pairs or not all(text_of(answer) for _, answer in pairs):
        raise SampleError("no_turns", "it is no conversation of questions and their answers")
    if any(not spoken_seconds(text_of(side)) for pair in pairs for side in pair):
        raise SampleError("no_text", "a turn has nothing to speak")
    if any(not isinstance(element, TextElement) for _, answer in pairs for element in answer):
        raise SampleError("has_media", "an answer with images cannot be spoken")
    # Speak turn by turn, in order: each language's voice is drawn when it is first needed.
    speaker = DocumentSpeaker.for_document(
        config.speech, document, draft, " ".join(text_of(side) for pair in pairs for side in pair)
    )
    kept: dict[MediaReference, MediaReference] = {}
    spoken = [
        (_hear(question, document, draft, speaker, kept), _say(text_of(answer), speaker)) for question, answer in pairs
    ]
    draft.add(conversation(spoken, text_of(head), config.voice), "dialogue")


def _cut_turn(turn: Sequence[Element]) -> tuple[list[Element], list[Element]]:
    """Cuts a turn into question and answer, without the marks of roles."""
    sides: tuple[list[Element], list[Element]] = [], []
    answers = False
    for element in turn:
        if not isinstance(element, TextElement) or element.plain:
            sides[answers].append(element)
            continue
        for part in filter(None, SPECIAL.split(element.text)):
            answers = answers or part == ASSISTANT
            if not SPECIAL.fullmatch(part):
                sides[answers].append(replace(element, text=part))
    return sides


def _hear(
    question: Sequence[Element],
    document: Document,
    draft: Draft,
    speaker: DocumentSpeaker,
    kept: dict[MediaReference, MediaReference],
) -> Source:
    """Writes images and videos, each file kept once, then the words as speech, a clip for a few sentences."""
    media = [element for element in question if not isinstance(element, TextElement)]
    for element in media:
        if element.reference not in kept:
            kept[element.reference] = MediaReference(path=draft.link(find_media(element.reference, document.media)))
    shown = write_prompt(replace(element, reference=kept[element.reference]) for element in media)
    heard = (audio_tag(speaker.say(text)) for text in sentences_of(text_of(question), speaker.config))
    return join([shown, *heard])


def _say(answer: str, speaker: DocumentSpeaker) -> Source:
    pieces = pieces_of(answer, speaker.config)
    if len(pieces) > MAX_ANSWER_PIECES:
        raise SampleError("too_long", f"an answer has {len(pieces)} pieces to speak, not {MAX_ANSWER_PIECES} at most")
    return spoken_answer(pieces, speaker.say)


INTLV = SynthesisTask(
    "intlv",
    "Speech and text in turns (INTLV): audio_1 text_2 audio_3 text_4 ..., loss on the text alone.",
    _add_alternating_arguments,
    partial(_alternating_job, name="intlv", write=write_intlv),
)
ITTS = SynthesisTask(
    "itts",
    "Text and its speech in turns (ITTS): text_1 audio_1 text_2 audio_2 ..., loss on all but the first text.",
    _add_alternating_arguments,
    partial(_alternating_job, name="itts", write=write_itts),
)
ASR = SynthesisTask(
    "asr",
    "Speech to be transcribed (ASR): a task prompt, a sentence of the text as speech, its words; loss on the words.",
    add_speech_arguments,
    partial(_sentence_job, name="asr", maker=transcribe),
)
TTS = SynthesisTask(
    "tts",
    "Text to be spoken (TTS): a task prompt, a sentence of the text, its speech; loss on the speech.",
    add_speech_arguments,
    partial(_sentence_job, name="tts", maker=speak_sentence),
)
DIALOGUE = SynthesisTask(
    "dialogue",
    "Conversations that are spoken: questions heard, answers written and spoken piece by piece; loss on the answers.",
    _add_dialogue_arguments,
    _dialogue_job,
)
