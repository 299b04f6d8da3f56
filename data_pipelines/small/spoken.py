"""Documents that are heard and spoken: words to be written down, text to be read aloud, questions asked by voice."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_pipelines.documents.prompt_writing import (
    ASR_PROMPT,
    Source,
    audio_tag,
    join,
    spoken_answer,
    trainable,
    turn,
)
from data_pipelines.small import text
from data_pipelines.small.speech import ANSWERS, Clip, digits, distinct, phrase, sentence, voice, words
from data_pipelines.small.words import Question

WORDS_A_PIECE = 2
ASKED = 24
"""Recordings of one question at most: its wordings are few, and one that is heard again costs no file."""

Written = list[tuple[str, Source]]
"""Types and prompts of documents."""
# A tag of a picture, or nothing, and a question with its answer.
Asked = Callable[[random.Random], tuple[Source, Question]]


@dataclass
class SpeechPlan:
    """Recordings that have to be made, by path."""

    clips: dict[str, Clip] = field(default_factory=dict)
    _asked: dict[tuple[str, bool, bool], list[str]] = field(default_factory=dict)

    def add(self, rng: random.Random, said: str, *, new: bool = False, answer: bool = False) -> str:
        """Plans a recording; returns its path.

        Args:
            rng: draws the voice.
            said: its text.
            new: whether the voice is one of held-out documents, which is heard there alone.
            answer: whether the model is to speak so, in its one voice.
        """
        path = f"speech/{len(self.clips):05d}.flac"
        self.clips[path] = Clip(said, *(ANSWERS if answer else voice(rng, new)))
        return path

    def ask(self, rng: random.Random, said: str, *, new: bool = False, answer: bool = False) -> str:
        """Plans a recording of a text that comes often, or returns one that is planned; arguments as `add`."""
        known = self._asked.setdefault((said, new, answer), [])
        # The model has one voice: a second recording would be the first again.
        if len(known) < (1 if answer else ASKED):
            known.append(self.add(rng, said, new=new, answer=answer))
            return known[-1]
        return rng.choice(known)


def transcripts(plan: SpeechPlan, rng: random.Random, said: Sequence[str], *, new: bool = False) -> Written:
    """Writes a document for each text that asks for the words of its recording, in the released form."""
    return [("asr", join([ASR_PROMPT, audio_tag(plan.add(rng, each, new=new)), trainable(each)])) for each in said]


def readings(plan: SpeechPlan, said: Sequence[str]) -> Written:
    """Writes a document for each text that reads it aloud: in the form of a spoken answer, in pieces of two words."""
    # Behind each piece of text stands its speech: the model need not know where in a long text it is.
    say = lambda piece: plan.ask(random.Random(piece), piece.strip(), answer=True)  # noqa: E731
    return [("tts", turn(f"Read aloud: {each}", spoken_answer(pieces(each), say))) for each in said]


def pieces(said: str) -> list[str]:
    """Cuts a text into pieces of two words; all but the last have the space behind it."""
    words = said.split()
    cut = [" ".join(words[n : n + WORDS_A_PIECE]) for n in range(0, len(words), WORDS_A_PIECE)]
    return [f"{piece} " for piece in cut[:-1]] + cut[-1:]


def question_by_voice(
    plan: SpeechPlan, rng: random.Random, asked: Asked, *, new: bool = False, spoken: bool = False
) -> Source:
    """Writes a question that is heard, about the picture before it if there is one, and its answer.

    Args:
        plan: gets the recordings.
        rng: draws the question and who asks it.
        asked: gives a picture's tag, or none, and the question.
        new: as for `SpeechPlan.add`.
        spoken: whether the answer is spoken too, after its text.
    """
    shown, (question, answer) = asked(rng)
    heard = shown + audio_tag(plan.ask(rng, question, new=new))
    if not spoken:
        return turn(heard, answer)
    return turn(heard, spoken_answer([answer], lambda said: plan.ask(rng, said, answer=True)))


def ask_text(rng: random.Random, *, held_out: bool = False) -> tuple[Source, Question]:
    """Asks a short question without a picture: which of two numbers is larger, or a fact."""
    # Facts are known or not: what is held out of them are wordings, which are for the questions in writing.
    ability = rng.choice(("order",) if held_out else ("order", "facts"))
    return Source(""), text.question(rng, ability, held_out=held_out)


@dataclass(frozen=True)
class SpokenCounts:
    """How many documents of each source there are; and held-out ones of each ability."""

    words: int = 4000
    numbers: int = 3000
    sentences: int = 6000
    speech: int = 6000
    questions: int = 4000
    dialogue: int = 1500
    held_out: int = 96


SPOKEN_SOURCES = ("words", "numbers", "sentences", "speech", "spoken_questions", "dialogue")


def plan_spoken(
    seed: int, counts: SpokenCounts, plan: SpeechPlan, asked: Asked, asked_held_out: Asked, held_out: str
) -> dict[str, Written]:
    """Plans all documents of speech, by the name of their manifest.

    Args:
        seed: another one gives other documents.
        counts: how many there are.
        plan: gets the recordings.
        asked: draws a question about a picture that trains.
        asked_held_out: draws one about a picture that no training document has.
        held_out: the folder of held-out documents.

    Returns:
        Manifest name -> its documents; those of abilities are `HELD_OUT/ABILITY`.
    """
    # What held-out documents say is drawn first: no training document says it.
    rng, known = random.Random(f"{seed}/speech/{held_out}"), set[str]()
    new = {}
    for kind, draw in {"numbers": digits, "sentences": sentence}.items():
        new[f"hear_{kind}"] = transcripts(plan, rng, distinct(draw, rng, counts.held_out, known), new=True)
        new[f"speak_{kind}"] = readings(plan, distinct(draw, rng, counts.held_out // 2, known))
    questions = {"hear_question": asked_held_out, "hear_order": lambda rng: ask_text(rng, held_out=True)}
    for ability, ask in questions.items():
        new[ability] = [(ability, question_by_voice(plan, rng, ask, new=True)) for _ in range(counts.held_out)]

    # Texts that train may come again: there are not so many of two digits.
    def drawn(draw: Callable[[random.Random], str], count: int) -> list[str]:
        return [next(filter(lambda said: said not in known, iter(lambda: draw(rng), None))) for _ in range(count)]

    def ask(rng: random.Random) -> tuple[Source, Question]:
        return asked(rng) if rng.random() < 0.6 else ask_text(rng)

    trained: dict[str, Written] = {}
    rng = random.Random(f"{seed}/speech")
    short = lambda rng: rng.choice((words, phrase))(rng)  # noqa: E731
    for name, draw in {"words": short, "numbers": digits, "sentences": sentence}.items():
        trained[name] = transcripts(plan, rng, drawn(draw, getattr(counts, name)))
    # Half of it is words in no order: sentences alone teach to speak sentences, whichever are asked for.
    half, sixth = counts.speech // 2, counts.speech // 6
    read = drawn(words, half) + drawn(digits, sixth) + drawn(sentence, counts.speech - half - sixth)
    trained["speech"] = readings(plan, read)
    for name, spoken in (("spoken_questions", False), ("dialogue", True)):
        count = counts.dialogue if spoken else counts.questions
        trained[name] = [("aqa", question_by_voice(plan, rng, ask, spoken=spoken)) for _ in range(count)]
    return trained | {f"{held_out}/{name}": written for name, written in new.items()}
