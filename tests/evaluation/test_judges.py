"""Verdicts and the judge that gives them, over HTTP: also one that fails, hangs, or talks nonsense."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.judge_server import JudgeError, JudgeServer, find_model
from baichuan_omni_jax.evaluation.suites.judges import (
    GIVE_UP,
    RUBRICS,
    CachedJudge,
    Case,
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
        ("judgment", 3000 * '{"a":', None),
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


@contextmanager
def raw_server(pieces):
    """Sends bytes, and waits seconds, whatever is asked; yields the URL and a list with an entry for each request."""
    asked = []

    def serve(listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    asked.append(connection.recv(1 << 16))
                    for piece in pieces:
                        time.sleep(piece) if isinstance(piece, float) else connection.sendall(piece)
                    # What was not read of the question would reset the connection, at times before the answer is read.
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass
                except OSError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", asked


HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 4000\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "sentence", "requests"),
    [
        ([b"HTTP/1.0 302 Found\r\nLocation: http://other.example/v1\r\n\r\n"], "redirects to http://other.example", 1),
        ([b"HTTP/1.0 308 Moved\r\n\r\n"], "redirects elsewhere", 1),
        ([HEAD, *[b" ", 0.1] * 20], "not whole after 0.5 s", 2),
        ([HEAD, b"{}"], "gives no answer: IncompleteRead", 2),
        ([], "gives no answer", 2),
        ([b"SSH-2.0-OpenSSH\r\n"], "gives no answer", 2),
        ([b"HTTP/1.0 429 Wait\r\nRetry-After: \xb2\r\n\r\n"], "answers 429", 2),
        ([b"HTTP/1.0 200 OK\r\n\r\n<html>Sign in</html>"], "no JSON", 2),
        ([b"HTTP/1.0 200 OK\r\n\r\n" + 100000 * b'{"a":'], "no JSON", 2),
        ([b'HTTP/1.0 200 OK\r\n\r\n{"choices": "none"}'], "no chat completion", 2),
        ([b'HTTP/1.0 200 OK\r\n\r\n{"choices": [{"message": {"content": [1]}}]}'], "without text", 2),
    ],
)
def test_what_a_server_may_do_is_one_sentence(pieces, sentence, requests):
    """The key follows no redirect; a reply that trickles ends in time."""
    with raw_server(pieces) as (url, asked):
        with pytest.raises(JudgeError, match=re.escape(sentence)):
            server(url, tries=2).ask([{"role": "user", "content": "?"}])
        assert len(asked) == requests


def test_half_characters_of_a_judge_are_kept_as_question_marks(tmp_path):
    double = JudgeDouble(lambda count, message: b'{"choices": [{"message": {"content": "\\ud83d [[7]]"}}]}')
    with serve_judge(double) as url:
        for _ in range(2):
            (verdict,) = CachedJudge(server(url), tmp_path / "v").judge(cases(1, "alpaca_eval"))
            assert verdict.score == pytest.approx(0.7)
    assert len(double.requests) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"url": "http://"}, "'http://' is none that can be asked"),
        ({"url": "http://[::1"}, "none that can be asked"),
        ({"url": "http://host:port/v1"}, "none that can be asked"),
        ({"url": "http://a b/v1"}, "none that can be asked"),
        ({"url": "http://bücher.example/v1"}, "none that can be asked"),
        ({"timeout": 0.0}, "above 0 to 86400 seconds, not 0"),
        ({"timeout": float("nan")}, "not nan"),
        ({"timeout": 1e30}, "seconds, not 1e+30"),
        ({"key": "KEY_OF_THE_TEST"}, "$KEY_OF_THE_TEST is no key"),
    ],
)
def test_judges_that_no_request_could_reach(changes, sentence, monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_TEST", "sec\nret")
    given = JudgeServer(**{"url": "http://127.0.0.1:1/v1", "model": "judge"} | changes)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        given.check()
    assert "sec" not in str(caught.value).replace("seconds", "")


def test_a_key_that_ends_in_a_line_end_is_sent_without(monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret\n")
    double = JudgeDouble(lambda *_: "yes")
    with serve_judge(double) as url:
        judge = server(url, key="KEY_OF_THE_TEST")
        judge.check()
        assert judge.ask([{"role": "user", "content": "?"}]) == "yes"
    assert double.keys == {"Bearer secret"}


def test_verdicts_that_somebody_edited_or_that_are_no_file(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    double = JudgeDouble(lambda *_: "the score is [Correct]")
    with serve_judge(double) as url:
        CachedJudge(server(url), path).judge(cases(1))
        line = json.loads(path.read_text())
        for odd in (json.dumps(line | {"value": 7}), json.dumps(line | {"key": []}), "[]", "[" * 50000, "\0"):
            path.write_text(odd + "\n")
            (verdict,) = CachedJudge(server(url), path).judge(cases(1))
            assert verdict.score == 1
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"verdicts\.jsonl cannot be written: Is a directory"):
        CachedJudge(server("http://127.0.0.1:1"), path)


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
