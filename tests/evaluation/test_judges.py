"""Verdicts and the judge that gives them, over HTTP: also one that fails, hangs, or talks nonsense."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.judges import (
    GIVE_UP,
    RUBRICS,
    CachedJudge,
    Case,
    JudgeServer,
    find_model,
    parse_verdict,
    read_rubrics,
)
from tests.helpers.suite_files import JudgeDouble, serve_judge

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("form", "reply", "score"),
    [
        ("rating", "Good. [[8]]", 0.8),
        ("rating", "From [[1]] to [[10]] I say [[10]]", 1.0),
        ("rating", "[[11]]", None),
        ("rating", "[[0]]", None),
        ("rating", "8", None),
        ("score_is", "Hm. The score is [Correct]", 1.0),
        ("score_is", "the score is [Incorrect].", 0.0),
        ("score_is", "the score is [Correct|Incorrect]", None),
        ("score_is", "It is correct", None),
        ("points", "3 steps, then the end: 5", 1.0),
        ("points", "Score: 0", 0.0),
        ("points", "I give 4 of 7.5", 0.8),
        ("points", "42", None),
        ("points", "none", None),
        ("judgment", '{"analysis": "same", "judgment": "correct"}', 1.0),
        ("judgment", '```json\n{"analysis": "other", "judgment": "Incorrect"}\n```', 0.0),
        ("judgment", '{"analysis": "the set {1, 2}", "judgment": "correct"} or so', 1.0),
        ("judgment", '{"judgment": "maybe"}', None),
        ("judgment", '{"judgment": true}', None),
        ("judgment", "correct", None),
        ("judgment", "{broken", None),
    ],
)
def test_forms_of_verdicts(form, reply, score):
    assert parse_verdict(reply, form) == (None if score is None else pytest.approx(score))


def cases(count: int, subset: str = "llama_questions", answer: str = "reply") -> list[Case]:
    return [Case(str(n), RUBRICS[subset], f"question {n}", ("Paris",), f"{answer} {n}") for n in range(count)]


def server(url: str, **changes) -> JudgeServer:
    return JudgeServer(url=url, model="judge", timeout=0.5, pause=0.01, **changes)


def test_a_judge_that_fails_and_hangs_and_recovers_judges_all(tmp_path, monkeypatch):
    """An error, a reply that never comes, one that is no completion: tried again. Nonsense is a verdict that is left
    out, not tried again.
    """
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")

    def reply(count, message):
        number = int(re.search(r"question (\d)", message)[1])
        if number == 5:
            return "I would rather not."
        if count < 3:
            return (500, 2.0, b"<html>", 429, json.dumps({"choices": []}).encode())[(number + count) % 5]
        return "the score is [Correct]" if number % 2 else "the score is [Incorrect]"

    double = JudgeDouble(reply)
    with serve_judge(double) as url:
        judge = CachedJudge(server(url, key="KEY_OF_THE_TEST"), tmp_path / "verdicts.jsonl")
        verdicts = judge.judge(cases(8))
    assert [verdict.score for verdict in verdicts] == [0, 1, 0, 1, 0, None, 0, 1]
    assert verdicts[5].problem == "unparsable"
    assert double.keys == {"Bearer secret"}
    assert judge.notes == []
    assert {request["temperature"] for request in double.requests} == {0.0}


def test_a_verdict_is_asked_for_once(tmp_path):
    """The cache goes by content: another answer, rubric or model is another request; a cut-off line is none."""
    double = JudgeDouble(lambda count, message: "the score is [Correct]")
    path = tmp_path / "verdicts.jsonl"
    with serve_judge(double) as url:
        CachedJudge(server(url), path).judge(cases(4))
        with path.open("a") as file:
            file.write('{"key": "half')
        again = CachedJudge(server(url), path).judge(cases(4))
        assert len(double.requests) == 4
        assert [verdict.score for verdict in again] == [1] * 4
        CachedJudge(server(url), path).judge([*cases(4), *cases(1, answer="other")])
        assert len(double.requests) == 5
        CachedJudge(server(url), path).judge(cases(4))
        assert len(double.requests) == 5
        other = JudgeServer(url=url, model="another")
        CachedJudge(other, path).judge(cases(1))
        assert len(double.requests) == 6


def test_five_rounds_are_five_samples_and_their_mean(tmp_path):
    double = JudgeDouble(lambda count, message: ("5", "4", "nonsense", "3", "4")[count - 1])
    with serve_judge(double) as url:
        (verdict,) = CachedJudge(server(url, at_once=1), tmp_path / "v").judge(cases(1, "reasoning_qa"))
    assert verdict.score == pytest.approx((5 + 4 + 3 + 4) / 4 / 5)
    assert [request["seed"] for request in double.requests] == [0, 1, 2, 3, 4]


def test_a_judge_that_is_down_is_given_up_and_asked_again_later(tmp_path):
    path, down = tmp_path / "verdicts.jsonl", [True]
    double = JudgeDouble(lambda count, message: 503 if down[0] else "the score is [Correct]")
    with serve_judge(double) as url:
        judge = CachedJudge(server(url, tries=2, at_once=1), path)
        verdicts = judge.judge(cases(40))
        assert {verdict.problem for verdict in verdicts} == {"not_judged"}
        assert "answers 503" in judge.notes[0]
        assert "asked no more" in judge.notes[1]
        assert len(double.requests) < 2 * 40
        assert len(double.requests) >= 2 * GIVE_UP
        down[0] = False
        assert [verdict.score for verdict in CachedJudge(server(url), path).judge(cases(40))] == [1] * 40


def test_a_wrong_key_is_told_after_one_request(tmp_path):
    double = JudgeDouble(lambda count, message: 401)
    with serve_judge(double) as url:
        judge = CachedJudge(server(url, at_once=1), tmp_path / "v")
        assert {verdict.problem for verdict in judge.judge(cases(9))} == {"not_judged"}
    assert len(double.requests) <= 2
    assert "answers 401" in judge.notes[0]
    assert "is $OPENAI_API_KEY set?" in judge.notes[0]


def test_the_only_model_of_a_judge_is_found():
    with serve_judge(JudgeDouble(lambda *_: "")) as url:
        assert find_model(server(url)) == "judge"
    with (
        serve_judge(JudgeDouble(lambda *_: "", models=("a", "b"))) as url,
        pytest.raises(ConfigError, match="has a, b"),
    ):
        find_model(server(url))
    with pytest.raises(ConfigError, match="--judge-model must be given"):
        find_model(server("http://127.0.0.1:9/v1"))


def test_rubrics_of_a_file(tmp_path):
    path = tmp_path / "rubrics.json"
    path.write_text(json.dumps({"trivia_qa": 'Is {answer} like {reference}? {"judgment": ...}'}))
    rubrics = read_rubrics(path)
    message = rubrics["trivia_qa"].messages("q", ("Paris",), "{reference}")[0]["content"]
    assert message == 'Is {reference} like Paris? {"judgment": ...}'
    assert rubrics["trivia_qa"].form == "judgment"
    assert rubrics["alpaca_eval"] is RUBRICS["alpaca_eval"]
    for values, sentence in (
        ({"x": "{answer}"}, "a rubric for 'x'"),
        ({"trivia_qa": "right?"}, "no text with {answer}"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(ConfigError, match=sentence):
            read_rubrics(path)


def test_judging_needs_no_jax():
    """A machine that only scores answers imports this in a moment."""
    code = "import sys, baichuan_omni_jax.evaluation.suites.judges; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
