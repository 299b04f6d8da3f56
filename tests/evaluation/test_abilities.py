"""Scores of abilities: what a scripted model answers equals what is computed by hand, beside chance."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from rich.console import Console

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.errors import RequestError
from baichuan_omni_jax.evaluation.abilities import (
    Answer,
    ability_table,
    answer_limits,
    ask,
    blind_accuracy,
    longest,
    others_error_rate,
    score_answers,
)
from baichuan_omni_jax.generation.events import AudioCodes, Finished, TextDelta
from data_pipelines.documents.document import EncodedDocument, encode_ids
from data_pipelines.documents.questions import Question


def scripted(ids=(1, 2, 3, 4, 5), shown: int = 1) -> EncodedDocument:
    """A prompt of which nothing but its tokens is read, and whether it shows anything."""
    prompt = encode_ids([int(token) for token in ids], tiny())
    return replace(prompt, visual_slots=np.arange(shown, dtype=np.int32))


@dataclass(frozen=True)
class Asked:
    """A question with what a scripted engine answers: text, or code frames."""

    asked: str
    reference: str
    answer: str = ""
    type: str = "qa"
    codes: tuple[int, ...] = ()
    frames: int = 0
    location: str = "m.jsonl:1"
    prompt: EncodedDocument = field(default_factory=scripted)

    @property
    def tokens(self) -> int:
        return 0 if self.frames else len(self.reference)


class ScriptedEngine:
    """Answers each prompt by its script; keeps the settings that it was asked with."""

    def __init__(self, questions, heard=()):
        self.scripts = {id(question.prompt): question for question in questions}
        self.heard, self.settings = dict(heard), []

    def submit(self, prompt, settings, key):
        self.settings.append(settings)
        script = self.scripts.get(id(prompt))
        if script is None:
            return iter([TextDelta(self.heard[tuple(prompt.tokens.tolist())], (1,), (0.0,)), finished()])
        if script.answer == "too long":
            raise RequestError("too_long", "the prompt is too long")
        if script.answer == "broken":
            return broken()
        if script.codes:
            return iter([AudioCodes(np.array([script.codes], np.int32).T, True), finished()])
        return iter([TextDelta(script.answer, (1,), (0.0,)), finished()])


def finished() -> Finished:
    return Finished("end", 5, 1, 0, None, None, 0.0, np.zeros(1, np.int32))


def broken():
    raise RequestError("failed", "the engine failed")
    yield


def scores(questions, heard=()):
    engine = ScriptedEngine(questions, heard)
    answers = ask(engine, {"a": questions}, {"a": lambda codes: scripted(codes[:, 0])})["a"]
    return score_answers(questions, answers, {})


def test_accuracy_and_its_chance():
    """Three of five right; without the picture: two of three colors by "red", and one of the two others."""
    questions = [
        Asked("What color?", "It is red.", "it is RED"),
        Asked("What color?", "It is red.", "It is blue."),
        Asked("What color?", "It is blue.", "It is blue."),
        Asked("How many?", "There are two.", "There are two"),
        Asked("Where?", "On the left.", ""),
    ]
    score = scores(questions)
    assert (score.kind, score.items, score.score) == ("exact", 5, 3 / 5)
    assert score.chance == blind_accuracy(questions) == (2 + 1) / 5
    assert score.low <= score.score <= score.high
    assert not score.beyond_chance
    assert score.wer is None
    assert score.metrics() == {"accuracy": 3 / 5, "chance": 3 / 5, "items": 5}


def test_error_rates_of_transcription():
    """One edit in 7 characters and one word of two, and Chinese, which has no words here; case and signs are aside."""
    questions = [
        Asked("Transcribe:", "He says.", "he say", type="asr"),
        Asked("Transcribe:", "你好。", "你好", type="asr"),
    ]
    score = scores(questions)
    assert (score.kind, score.score, score.wer) == ("transcription", 1 / 9, 1 / 2)
    # The other's reference as the answer is 14 edits in 9 characters: worse than no answer.
    assert score.chance == others_error_rate(questions) == 1
    assert score.metrics() == {"cer": 1 / 9, "chance": 1, "items": 2, "wer": 1 / 2}
    # "two boats" for "ten boats" and the other way round: two edits in nine characters each.
    assert others_error_rate([Asked("", "two boats"), Asked("", "ten boats")]) == 4 / 18


def test_speech_is_heard_by_the_model_itself():
    """The frames that were spoken are the second prompt's audio; silence is an answer in which nothing is heard."""
    questions = [
        Asked("good day", "good day", codes=(3, 1, 4), frames=3),
        Asked("good night", "good night", frames=4),
    ]
    engine = ScriptedEngine(questions, {(3, 1, 4): "good bay"})
    answers = ask(engine, {"tts": questions}, {"tts": lambda codes: scripted(codes[:, 0])})["tts"]
    assert answers == [Answer("good bay", 3), Answer("", 0)]
    # What was heard is what is put into sound.
    assert [[piece.ravel().tolist() for piece in answer.speech] for answer in answers] == [[[3, 1, 4]], []]
    score = score_answers(questions, answers, {})
    assert (score.kind, score.score) == ("speech", (1 + 10) / 18)


def test_chance_of_questions_in_text_alone_is_the_best_constant_answer():
    """What is asked twice has the same answer twice, which is no luck."""
    twice = [Asked(f"{n} + {n}?", str(2 * n), prompt=scripted(shown=0)) for n in (1, 2, 3) for _ in range(2)]
    assert blind_accuracy(twice) == 2 / 6
    assert blind_accuracy([replace(question, prompt=scripted()) for question in twice]) == 1.0


def test_an_answer_of_text_and_speech_is_given_leave_to_speak():
    """A prompt that ends where speech begins is spoken as it is; one that text answers is never spoken."""
    read, said, text = (Question("", "", "", scripted(), "ab", n, m) for n, m in ((7, 9), (0, 9), (7, 0)))
    assert [answer_limits([question]).speech for question in (read, said, text)] == [True, False, False]
    assert answer_limits([read]).segment_frames > 9


def test_what_cannot_be_asked_is_counted_and_the_others_go_on():
    questions = [Asked("?", "yes", "yes"), Asked("?", "yes", "too long"), Asked("?", "no", "broken")]
    answers = ask(ScriptedEngine(questions), {"a": questions}, {})["a"]
    score = score_answers(questions, answers, {"missing_file": 2})
    assert (score.items, score.score) == (1, 1.0)
    assert score.left_out == {"missing_file": 2, "too_long": 1, "failed": 1}
    assert score_answers(questions[1:], answers[1:], {}) is None


def test_answers_are_greedy_and_bounded_by_the_references():
    questions = [Asked("?", "ab", "ab"), Asked("?", "abcd", "x")]
    engine = ScriptedEngine(questions)
    ask(engine, {"a": questions}, {})
    assert engine.settings == [answer_limits(questions)] * 2
    assert engine.settings[0].max_tokens == 2 * 4 + 8
    assert engine.settings[0].text.temperature == 0
    # A prompt of 5 and its answer fit into a row of the engine.
    assert longest({"a": questions}) >= 5 + 16 + 1


@pytest.mark.parametrize(("right", "beyond"), [(30, "yes"), (2, "no")])
def test_the_table_says_what_is_beyond_chance(right, beyond):
    questions = [Asked("?", f"number {n}", f"number {n}" if n < right else "nothing") for n in range(30)]
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(ability_table({"count": scores(questions)}, "abilities"))
    row = next(line for line in console.export_text().splitlines() if "count" in line)
    assert f"accuracy {100 * right / 30:.0f} %" in row
    assert beyond in row
    assert f"{100 / 30:.0f} %" in row
