"""Judges of free answers: a model behind an OpenAI-compatible URL, whose verdicts are parsed, cached and counted.

The rubrics are our own words, not those of the benchmarks' code: figures by them are near the published ones, not the
same measurement. A file of your own rubrics takes their place (`read_rubrics`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.judge_server import JudgeError, JudgeServer
from baichuan_omni_jax.storage import read_json_object

VerdictForm = Literal["rating", "score_is", "points", "judgment"]
PLACES = ("question", "reference", "answer")
GIVE_UP = 10  # failures one after the other, each tried several times, after which nothing more is asked


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked, and the form of its verdict.

    Attributes:
        form: "rating" `[[1]]` to `[[10]]`; "score_is" `the score is [Correct]`; "points" the last digit 0 to 5;
            "judgment" JSON with `"judgment": "correct"`.
        text: the message, with {question}, {reference} and {answer}.
        rounds: how often it is asked; the score is the mean. Several rounds are sampled, each with a seed of its own.
    """

    form: VerdictForm
    text: str
    rounds: int = 1

    def messages(self, question: str, references: Sequence[str], answer: str) -> list[dict[str, str]]:
        """Fills the text in."""
        filled = {"question": question, "reference": "\n".join(references) or "(none is given)", "answer": answer}
        # In one pass: an answer may hold the name of a place.
        text = re.sub(r"\{(question|reference|answer)\}", lambda found: filled[found[1]], self.text)
        return [{"role": "user", "content": text}]


_DATA = "\n\nQuestion:\n{question}\n\nReference:\n{reference}\n\nReply to be judged:\n{answer}\n"
_FACT = "A spoken question was put to an assistant. Decide whether its reply gives the fact that the reference gives. "
# By subset of OpenAudioBench; the verdicts' forms are those of its own code.
RUBRICS: dict[str, Rubric] = {
    "alpaca_eval": Rubric(
        "rating",
        "Rate how well an assistant's reply serves the person who asked: is it right, to the point, complete and clear?"
        " Length alone earns nothing. Say why in two sentences, then end with a whole number from 1 (useless) to 10 "
        "(could not be better) in double square brackets, such as [[4]]."
        "\n\nRequest:\n{question}\n\nReply to be judged:\n{answer}\n",
    ),
    "llama_questions": Rubric(
        "score_is",
        _FACT + "Other words for the same thing count as right, a reply that only names the topic does not. Say why in "
        "one sentence, then end with one of the two lines\nthe score is [Correct]\nthe score is [Incorrect]" + _DATA,
    ),
    "reasoning_qa": Rubric(
        "points",
        "A riddle of logic was put to an assistant. Compare the conclusion of its reply, and the way there, with the "
        "reference. 5: the same conclusion, soundly reached; 4: the same with small gaps; 3: partly right; 2: a right "
        "beginning alone; 1: it speaks of the riddle and is wrong; 0: it does not answer. Say why briefly; the last "
        "character that you write is the number." + _DATA,
        rounds=5,
    ),
    **{
        subset: Rubric(
            "judgment",
            _FACT + "Each line of the reference counts as right by itself. Reply with JSON alone: "
            '{"analysis": "one sentence", "judgment": "correct" or "incorrect"}' + _DATA,
        )
        for subset in ("trivia_qa", "web_questions")
    },
}


def parse_verdict(reply: str, form: VerdictForm) -> float | None:
    """Reads the verdict in a judge's reply, from 0 to 1; None where there is none.

    >>> parse_verdict("Clear and short. [[8]]", "rating"), parse_verdict("The score is [Incorrect].", "score_is")
    (0.8, 0.0)
    >>> parse_verdict("Right in part: 3", "points"), parse_verdict('{"judgment": "correct"}', "judgment")
    (0.6, 1.0)
    """
    # The last one counts: a judge may weigh aloud before it decides.
    if form == "rating":
        ratings = [float(text) for text in re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", reply)]
        return ratings[-1] / 10 if ratings and 1 <= ratings[-1] <= 10 else None
    if form == "points":
        # A digit of a larger number is no verdict.
        points = re.findall(r"(?<![\d.])[0-5](?!\d|\.\d)", reply)
        return int(points[-1]) / 5 if points else None
    if form == "score_is":
        # Both words in one bracket are the instruction repeated.
        words = re.findall(r"the score is:?\s*\[?(correct|incorrect)\b(?!\s*[|/])", reply, re.I)
        return float(words[-1].lower() == "correct") if words else None
    decoder = json.JSONDecoder()
    # The last object that is whole: an analysis may hold braces, and a fence may stand around it.
    for start in reversed([found.start() for found in re.finditer(r"\{", reply)]):
        with suppress(ValueError, RecursionError):
            judgment = decoder.raw_decode(reply, start)[0].get("judgment")
            if isinstance(judgment, str) and judgment.strip().lower() in ("correct", "incorrect"):
                return float(judgment.strip().lower() == "correct")
    return None


def read_rubrics(path: Path) -> dict[str, Rubric]:
    """Reads rubrics of the user's: JSON, subset -> text with {answer} and, if wanted, {question} and {reference}.

    The verdict's form and the rounds stay those of the subset. Raises ConfigError naming what cannot be used.
    """
    made = {}
    for name, text in read_json_object(path).items():
        if name not in RUBRICS:
            raise ConfigError(f"{path} has a rubric for {name!r}; there are {', '.join(RUBRICS)}")
        if not isinstance(text, str) or "{answer}" not in text:
            raise ConfigError(f"{path}: the rubric for {name} is no text with {{answer}} in it")
        made[name] = replace(RUBRICS[name], text=text)
    return RUBRICS | made


@dataclass(frozen=True)
class Case:
    """One answer to be judged."""

    id: str
    rubric: Rubric
    question: str
    references: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What became of a case: `score` from 0 to 1, or the `problem`, "unparsable" or "not_judged"."""

    id: str
    score: float | None
    problem: str = ""


class ContentCache:
    """Texts that were found out by content, in a file of JSON lines that is added to: found once, kept over a kill.

    Raises ConfigError where the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self._path, self._known = path, dict[str, str]()
        # Opened for writing before anything is asked: what could not be kept would be asked for each time.
        try:
            with path.open("ab+") as file:
                file.seek(0)
                lines = file.read().splitlines(keepends=True)
                if lines and not lines[-1].endswith(b"\n"):
                    file.write(b"\n")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
        for line in lines:
            # A line that a crash of the machine damaged is found out anew.
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                values = json.loads(line)
                if isinstance(values["value"], str):
                    self._known[values["key"]] = values["value"]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> str:
        return self._known[key]

    def add(self, key: str, value: str, **also: Any) -> None:
        """Keeps a value, with what else a reader of the file may want to see."""
        self._known[key] = value
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **also, "value": value}, ensure_ascii=False) + "\n")


class CachedJudge:
    """Asks a judge each thing once: replies are kept by their content.

    `name` is the model's; `notes` are the sentences of what went wrong, each once.
    """

    def __init__(self, server: JudgeServer, cache: Path):
        self.name = server.model
        self._server, self._replies, self.notes = server, ContentCache(cache), list[str]()

    def judge(self, cases: Sequence[Case], report: Callable[[str], None] = lambda line: None) -> list[Verdict]:
        """Judges the cases, several at a time. A case without a verdict has its problem; the others go on."""
        asked = [(case, seed) for case in cases for seed in (range(case.rubric.rounds))]
        keys = {(case.id, seed): self._key(case, seed) for case, seed in asked}
        left = {keys[case.id, seed]: (case, seed) for case, seed in asked if keys[case.id, seed] not in self._replies}
        # Replies that are known, of this run or an earlier one, are not asked for.
        if left:
            report(f"judging: {len(keys) - len(left)} of {len(keys)} verdicts are known, {len(left)} are asked for")
            self._ask(left)
        return [self._verdict(case, [keys[case.id, seed] for seed in range(case.rubric.rounds)]) for case in cases]

    def _ask(self, left: Mapping[str, tuple[Case, int]]) -> None:
        # Workers look at `stopped` before each request; only this thread writes the cache.
        failures, stopped = 0, False

        def ask(key: str) -> tuple[str, str | JudgeError]:
            case, seed = left[key]
            if stopped:
                return key, JudgeError("", False)
            messages = case.rubric.messages(case.question, case.references, case.answer)
            try:
                return key, self._server.ask(messages, seed if case.rubric.rounds > 1 else None)
            except JudgeError as error:
                return key, error

        with ThreadPoolExecutor(self._server.at_once) as pool:
            try:
                for key, reply in pool.map(ask, left):
                    if not isinstance(reply, JudgeError):
                        failures = 0
                        self._replies.add(key, reply, id=left[key][0].id)
                        continue
                    failures += 1
                    self._note(str(reply))
                    # A judge that is down would cost every case all its tries.
                    if reply.final or failures >= GIVE_UP:
                        stopped = True
                        self._note("the judge was asked no more: the same command goes on with what is left")
            except BaseException:
                stopped = True
                raise

    def _note(self, sentence: str) -> None:
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)

    def _key(self, case: Case, seed: int) -> str:
        """The content of a request: another model, rubric or answer is another one."""
        messages = case.rubric.messages(case.question, case.references, case.answer)
        content = json.dumps([self._server.model, messages, seed], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def _verdict(self, case: Case, keys: Sequence[str]) -> Verdict:
        # A round that is missing may change the mean: the case waits until all are there.
        replies = [self._replies[key] for key in keys if key in self._replies]
        if len(replies) < len(keys):
            return Verdict(case.id, None, "not_judged")
        # Of several rounds those count that can be read.
        scores = [score for score in (parse_verdict(reply, case.rubric.form) for reply in replies) if score is not None]
        return Verdict(case.id, sum(scores) / len(scores)) if scores else Verdict(case.id, None, "unparsable")
