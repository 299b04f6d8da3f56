"""A manifest of questions answered into a file of answers, many at a time; a run that was killed goes on.

Both are JSON lines. Line n of the manifest is answered by `{"line": n, "id": ..., ...}`, or by `{"line", "id", "cause",
"error"}` when it cannot be. Answers come in the manifest's order.
"""

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.generation.chat_stream import ChatAnswer, ChatStream
from baichuan_omni_jax.storage import take_lock

INTERVAL = 5.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Question:
    """Line `line` of a manifest: its `values` without the id, or the `error` that it is no question."""

    line: int
    id: str
    values: Mapping[str, Any]
    error: RequestError | None = None


def read_questions(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> list[Question]:
    """Every line that is not empty. `id` defaults to the line's number; `read` gives the bytes of the manifest.

    Raises ConfigError when it cannot be read.
    """
    try:
        lines = read(path).split(b"\n")
    except OSError as error:
        raise ConfigError(f"manifest {path} cannot be read: {error.strerror}") from error
    return [_question(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def answer_questions(
    questions: list[Question],
    output: Path,
    ask: Callable[[Question], ChatStream],
    record: Callable[[Question, ChatAnswer], dict[str, Any]],
    *,
    at_once: int,
    report: Callable[[str], None] = lambda line: None,
) -> Counter:
    """Answers what `output` does not answer yet, `at_once` questions at a time; returns how many of each outcome.

    `ask` puts a question to the chat and `record` gives the fields of its answer; what either raises as RequestError is
    the question's answer. Outcomes are `answered`, `kept` (there already) and causes of errors. Each line is written
    whole. Raises ConfigError when `output` cannot be written, answers another manifest, or is being written by another
    program.
    """
    # One writer: a second would answer the same questions and break the order of lines.
    lock = take_lock(output, f"{output} is being written by another program; nothing was changed", note=False)
    try:
        return _answer(questions, output, ask, record, at_once, report)
    finally:
        lock.release()


def _answer(
    questions: list[Question],
    output: Path,
    ask: Callable[[Question], ChatStream],
    record: Callable[[Question, ChatAnswer], dict[str, Any]],
    at_once: int,
    report: Callable[[str], None],
) -> Counter:
    """`answer_questions`, alone with the file."""
    done = _read_done(output, questions, report)
    left = deque(question for question in questions if question.line not in done)
    progress = _Progress(len(questions), len(done), report)
    asked: deque[tuple[Question, ChatStream | RequestError]] = deque()
    with output.open("a", encoding="utf-8") as file:
        # Keep `at_once` questions in the engine, write answers in the manifest's order.
        while left or asked:
            while left and len(asked) < at_once:
                question = left.popleft()
                asked.append((question, _put(question, ask)))
            question, reply = asked.popleft()
            line = _outcome(question, reply, record)
            file.write(encode_line({"line": question.line, "id": question.id} | line))
            # Line by line: a kill loses what was being answered, nothing that was reported.
            file.flush()
            progress.add(line)
    return progress.outcomes


def encode_line(values: Mapping[str, Any]) -> str:
    """Returns the line of a file of answers, with its end."""
    # Half a character, which a name of a file may hold, has no UTF-8: it stays what it was in JSON.
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _question(line: bytes, number: int) -> Question:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Question(number, str(number), {}, RequestError("bad_message", f"the line is not JSON: {error}"))
    if not isinstance(values, dict):
        return Question(number, str(number), {}, RequestError("bad_message", "the line is no JSON object"))
    identifier = str(values.pop("id", number))
    return Question(number, identifier, values)


def _put(question: Question, ask: Callable[[Question], ChatStream]) -> ChatStream | RequestError:
    if question.error is not None:
        return question.error
    try:
        return ask(question)
    except RequestError as error:
        return error


def _outcome(
    question: Question, reply: ChatStream | RequestError, record: Callable[[Question, ChatAnswer], dict[str, Any]]
) -> dict[str, Any]:
    if isinstance(reply, RequestError):
        return _refused(reply)
    try:
        # Waiting here runs the engine for all questions that were put to it, not for this one alone.
        return record(question, reply.answer())
    except RequestError as error:
        return _refused(error)


def _refused(error: RequestError) -> dict[str, Any]:
    return {"cause": error.cause, "error": str(error)}


def _read_done(output: Path, questions: list[Question], report: Callable[[str], None]) -> set[int]:
    """Lines that are answered.

    A last line that a kill left without its end is cut off, and so is everything from the first line on that a crash of
    the machine left as zeros or other bytes: what it answered is answered anew.
    """
    known = {question.line: question.id for question in questions}
    done, whole = set(), 0
    with output.open("rb") as file:
        # In bytes: only whole lines count, and their lengths say where the file is cut.
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break
            try:
                values = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                if not done and text.strip(b"\0\n"):  # a file of something else is left alone
                    raise ConfigError(f"{output}:{number} is no answer; it was not written by this command") from error
                report(f"{output} is damaged from line {number} on: what follows is answered anew")
                break
            done.add(_check_answer(values, known, f"{output}:{number}"))
            whole += len(text)
    if whole < output.stat().st_size:
        with output.open("rb+") as file:
            file.truncate(whole)
    return done


def _check_answer(values: Any, known: Mapping[int, str], where: str) -> int:
    """The line of the manifest that is answered. Raises ConfigError when it is none of `known` (id by line)."""
    try:
        line, identifier = values["line"], values["id"]
        expected = known.get(line)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{where} is no answer; it was not written by this command") from error
    if expected != identifier:
        raise ConfigError(f"{where} answers {identifier!r} of line {line}: another manifest's")
    return line


class _Progress:
    """Counts outcomes; tells, at most every `INTERVAL` seconds, how far it is and how long the rest will take."""

    def __init__(self, total: int, kept: int, report: Callable[[str], None]):
        self._total, self._kept, self._report = total, kept, report
        self.outcomes = Counter({"kept": kept} if kept else {})
        self._start = self._last = time.monotonic()

    def add(self, line: Mapping[str, Any]) -> None:
        self.outcomes[line.get("cause", "answered")] += 1
        now, finished = time.monotonic(), self.outcomes.total()
        if now - self._last >= INTERVAL or finished == self._total:
            self._last = now
            left = (now - self._start) * (self._total - finished) / (finished - self._kept)
            counts = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
            self._report(f"{finished} of {self._total} lines ({counts}), about {left:.0f} s left")
