"""A manifest answered into a file: order, refusals, and what a kill leaves."""

import json

import numpy as np
import pytest

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.batch_requests import answer_questions, read_questions
from baichuan_omni_jax.generation.chat_stream import ChatStream
from baichuan_omni_jax.generation.events import Finished, TextDelta
from baichuan_omni_jax.storage import take_lock


class Request:
    """Answers with its question; `log` is told when it is put and when it is served."""

    def __init__(self, text, log):
        self.text, self.log = text, log
        log.append(("put", text))

    def __iter__(self):
        self.log.append(("served", self.text))
        if self.text == "lost":
            raise RequestError("failed", "the engine failed")
        yield TextDelta(self.text, (1,), (0.0,))
        yield Finished("end", 1, 1, 0, 0.1, None, 0.2, np.zeros(2, np.int32))

    def cancel(self):
        pass


def run(folder, lines, output="out.jsonl", at_once=2, log=None):
    """Answers the lines; questions without a prompt are refused. Returns outcomes, and the output's objects."""
    manifest, log = folder / "in.jsonl", [] if log is None else log
    manifest.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))

    def ask(question):
        if "prompt" not in question.values:
            raise RequestError("bad_message", "prompt is missing")
        return ChatStream(Request(question.values["prompt"], log), None)

    record = lambda question, answer: {"text": answer.text, "finish": answer.finished.finish_reason}  # noqa: E731
    outcomes = answer_questions(read_questions(manifest), folder / output, ask, record, at_once=at_once)
    return outcomes, [json.loads(line) for line in (folder / output).read_text().splitlines()]


LINES = [{"id": "a", "prompt": "一"}, "{bad\n", "\n", {"id": "c"}, {"prompt": "lost"}, {"id": "e", "prompt": "two"}]
ANSWERS = [
    {"line": 1, "id": "a", "text": "一", "finish": "end"},
    {"line": 2, "id": "2", "cause": "bad_message"},
    {"line": 4, "id": "c", "cause": "bad_message", "error": "prompt is missing"},
    {"line": 5, "id": "5", "cause": "failed", "error": "the engine failed"},
    {"line": 6, "id": "e", "text": "two", "finish": "end"},
]


def test_good_lines_are_answered_and_bad_ones_named(tmp_path):
    outcomes, answers = run(tmp_path, LINES)
    assert outcomes == {"answered": 2, "bad_message": 2, "failed": 1}
    assert answers[1].pop("error").startswith("the line is not JSON")
    assert answers == ANSWERS


def test_several_are_asked_before_the_first_is_taken(tmp_path):
    log = []
    run(tmp_path, [{"prompt": str(n)} for n in range(4)], at_once=3, log=log)
    assert log[:5] == [("put", "0"), ("put", "1"), ("put", "2"), ("served", "0"), ("put", "3")]


def test_what_is_answered_is_not_asked_again(tmp_path):
    """The output is cut anywhere, as a kill does: whole lines stay, the last one is made anew."""
    _, whole = run(tmp_path, LINES)
    text = (tmp_path / "out.jsonl").read_bytes()
    second = text.index(b"\n", text.index(b"\n") + 1) + 1
    for end in (0, 5, second, second + 1, len(text) - 1):
        (tmp_path / "out.jsonl").write_bytes(text[:end])
        log = []
        outcomes, again = run(tmp_path, LINES, log=log)
        assert again == whole
        kept = text[:end].count(b"\n")
        assert outcomes["kept"] == kept
        assert (("put", "一") in log) == (kept == 0)
    outcomes, again = run(tmp_path, LINES)
    assert outcomes == {"kept": 5}
    assert again == whole


@pytest.mark.parametrize("damage", [bytes(40), bytes(40) + b"\n", b"\xff\xfe\x80\x81\n", b'{"line": 1, "id"\n'])
def test_what_a_crash_damaged_is_answered_anew(tmp_path, damage):
    """The second line is gone; the third, behind it, is whole, but the order is the manifest's."""
    _, whole = run(tmp_path, LINES)
    first, _, third, *_ = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(first + damage + third)
    outcomes, again = run(tmp_path, LINES)
    assert again == whole
    assert outcomes["kept"] == 1


def test_two_programs_do_not_write_one_output(tmp_path):
    lock = take_lock(tmp_path / "out.jsonl", "", note=False)
    with pytest.raises(ConfigError, match=r"out\.jsonl is being written by another program; nothing was changed"):
        run(tmp_path, LINES)
    lock.release()
    assert len(run(tmp_path, LINES)[1]) == 5


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ('{"line": 1, "id": "other"}\n', "another manifest's"),
        ('{"line": 9, "id": "a"}\n', "another manifest's"),
        ("hello\n", "no answer"),
        ("[1]\n", "no answer"),
        ('{"line": [1], "id": "a"}\n', "no answer"),
    ],
)
def test_an_output_of_something_else_is_left_alone(tmp_path, output, sentence):
    (tmp_path / "out.jsonl").write_text(output)
    with pytest.raises(ConfigError, match=sentence):
        run(tmp_path, LINES)
    assert (tmp_path / "out.jsonl").read_text() == output


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(tmp_path, LINES, output="none/out.jsonl")
