"""What the small recipe hears and says: held-out voices and texts, forms of documents, recordings that are shared."""

import random
import re

import pytest

from data_pipelines.documents.prompt_writing import Source
from data_pipelines.small.speech import ANSWERS, NEW_VARIANTS, VOCABULARY, digits, distinct, phrase, sentence, words
from data_pipelines.small.spoken import ASKED, SPOKEN_SOURCES, SpeechPlan, SpokenCounts, pieces, plan_spoken
from data_pipelines.small.words import Question

COUNTS = SpokenCounts(words=40, numbers=40, sentences=60, speech=30, questions=60, dialogue=30, held_out=20)
SAID = re.compile(r'"path": "([^"]+)"')


def planned(seed: int = 0):
    plan = SpeechPlan()
    ask = lambda rng: (Source("<picture>"), Question(rng.choice(["What color is it?", "Where is it?"]), "red"))  # noqa: E731
    return plan, plan_spoken(seed, COUNTS, plan, ask, ask, "held_out")


def read_aloud(documents) -> set[str]:
    return {re.search("Read aloud: ([^<]+)", prompt).group(1) for _, prompt in documents}


def clips_of(plan: SpeechPlan, documents) -> list:
    return [plan.clips[path] for _, prompt in documents for path in SAID.findall(prompt)]


def test_a_seed_gives_the_same_documents_and_recordings():
    (first, documents), (second, again), (_, other) = planned(), planned(), planned(1)
    assert documents == again
    assert first.clips == second.clips
    assert documents != other


def test_every_source_and_ability_has_its_documents():
    _, documents = planned()
    abilities = ("hear_numbers", "hear_sentences", "speak_numbers", "speak_sentences", "hear_question", "hear_order")
    assert set(documents) == {*SPOKEN_SOURCES, *(f"held_out/{name}" for name in abilities)}
    assert {name: len(written) for name, written in documents.items() if name in SPOKEN_SOURCES} == {
        **{"words": 40, "numbers": 40, "sentences": 60, "speech": 30, "spoken_questions": 60, "dialogue": 30}
    }


def test_held_out_recordings_are_of_new_voices_and_say_new_things():
    plan, documents = planned()
    heard = {True: [], False: []}
    for name, written in documents.items():
        spoken = [clip for clip in clips_of(plan, written) if (clip.voice, clip.rate, clip.pitch) != ANSWERS]
        heard[name.startswith("held_out/")] += spoken
    variants = {held_out: {clip.voice.partition("+")[2] for clip in clips} for held_out, clips in heard.items()}
    assert variants[True] <= set(NEW_VARIANTS)
    assert not variants[False] & set(NEW_VARIANTS)
    # Words alone are too few to be held out, and questions of a voice have a few wordings.
    for kind in ("numbers", "sentences"):
        trained = {clip.text for clip in clips_of(plan, documents[kind])} | read_aloud(documents["speech"])
        held_out = {clip.text for clip in clips_of(plan, documents[f"held_out/hear_{kind}"])}
        assert not trained & (held_out | read_aloud(documents[f"held_out/speak_{kind}"]))


def test_the_model_speaks_in_one_voice_and_a_question_is_not_recorded_again_and_again():
    plan, documents = planned()
    for name in ("speech", "held_out/speak_numbers"):
        assert {(clip.voice, clip.rate, clip.pitch) for clip in clips_of(plan, documents[name])} == {ANSWERS}
    rng, many = random.Random(0), SpeechPlan()
    asked = [many.ask(rng, "Where is it?") for _ in range(10 * ASKED)]
    assert len(set(asked)) == len(many.clips) == ASKED
    # The same words by a held-out voice are another recording, and an answer is one.
    assert many.ask(rng, "Where is it?", new=True) not in asked
    assert len({many.ask(rng, "red", answer=True) for _ in range(5)}) == 1


def test_text_is_read_aloud_in_pieces():
    for said in ("one", "the old dog sees a red ball near the river today"):
        cut = pieces(said)
        assert "".join(cut) == said
        assert [len(piece.split()) for piece in cut[:-1]] == [2] * (len(cut) - 1)
    plan, documents = planned()
    for _, prompt in documents["speech"]:
        (said,) = read_aloud([("tts", prompt)])
        assert [plan.clips[path].text for path in SAID.findall(prompt)] == [
            piece.strip() for piece in re.findall(r"(?:trainable_start>|audiogen_end_baichuan>)([^<]+)", prompt)
        ]
        assert " ".join(plan.clips[path].text for path in SAID.findall(prompt)) == said


def test_texts_are_of_the_vocabulary():
    rng = random.Random(0)
    known = {*VOCABULARY, "the", "a", "an"}
    drawn = [draw(rng) for draw in (digits, sentence, words, phrase) for _ in range(200)]
    assert {word for text in drawn for word in text.split()} <= known
    assert not [text for text in drawn if re.search(r"\ba [aeo]|\ban [^ao]", text)]
    sentences = {word for _ in range(2000) for word in sentence(rng).split()}
    assert len(sentences) >= 60
    assert len({len(text.split()) for text in (digits(rng) for _ in range(100))}) == 4


def test_distinct_texts_are_not_among_the_known():
    known = {"one two"}
    drawn = distinct(digits, random.Random(0), 50, known)
    assert len(set(drawn)) == 50
    assert "one two" not in drawn
    assert known == {*drawn, "one two"}


@pytest.mark.parametrize(("name", "tail"), [("spoken_questions", "<trainable_start>"), ("dialogue", "<audiogen_start")])
def test_answers_are_written_and_in_a_dialogue_spoken(name, tail):
    _, documents = planned()
    for _, prompt in documents[name]:
        answer = prompt.rpartition("<C_A>")[2]
        assert tail in answer
        assert answer.startswith("<trainable_start>")
        assert ("<audiogen_start" in answer) == (name == "dialogue")
