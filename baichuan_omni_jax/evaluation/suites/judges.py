"""Judges of free answers: a model behind an OpenAI-compatible URL, whose verdicts are parsed, cached and counted.

The rubrics are our own words, not those of the benchmarks' code: figures by them are near the published ones, not the
same measurement. A file of your own rubrics takes their place (`read_rubrics`).
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError
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
        with suppress(ValueError):
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


@dataclass(frozen=True, kw_only=True)
class JudgeServer:
    """An OpenAI-compatible server of chat completions.

    Attributes:
        url: up to `/v1`, or of `chat/completions` itself.
        model: its name there.
        key: the environment variable that holds the key; unset or empty: none is sent.
        timeout: seconds that one reply may take.
        tries: how often a request is made that fails for a reason that may pass.
        pause: seconds before the second try, doubled before each further one.
        at_once: requests at a time.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0
    at_once: int = 8

    def ask(self, messages: Sequence[Mapping[str, str]], seed: int | None = None) -> str:
        """Returns the reply's text.

        Args:
            messages: of the request.
            seed: of a reply that is sampled; None: the likeliest is wanted.

        Raises:
            JudgeError: the server does not answer, or not with a chat completion.
        """
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "temperature": 0.0}
        if seed is not None:
            body |= {"temperature": 0.7, "seed": seed}
        # What may pass is tried again, after pauses that grow: a server that restarts needs some seconds.
        for number in range(self.tries):
            try:
                return self._post(body)
            except JudgeError as error:
                if error.final or number + 1 == self.tries:
                    raise
                time.sleep(error.wait or self.pause * 2**number)
        raise AssertionError("tries must be at least 1")

    def _post(self, body: Mapping[str, Any]) -> str:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        reply = self.fetch(url, json.dumps(body).encode())
        try:
            text = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise JudgeError(f"the judge {url} answers something that is no chat completion", False) from error
        if not isinstance(text, str):
            raise JudgeError(f"the judge {url} answers without text", False)
        return text

    def fetch(self, url: str, body: bytes | None = None) -> Any:
        """Returns the JSON that `url` answers. Raises JudgeError: an error's code, no answer in time, no JSON."""
        # The key goes into the request alone: neither files nor messages have it.
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key, ""):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            # Too many requests and errors of the server pass; a wrong key, path or model does not.
            hint = f": is ${self.key} set?" if error.code in (401, 403) else ""
            wait = error.headers.get("Retry-After", "") if error.headers else ""
            passing = error.code in (408, 409, 429) or error.code >= 500
            sentence = f"the judge {url} answers {error.code} {error.reason}{hint}"
            raise JudgeError(sentence, not passing, min(float(wait), 60.0) if wait.isdigit() else 0.0) from error
        except (OSError, http.client.HTTPException) as error:  # refused, broken off, too slow
            reason = getattr(error, "reason", error)
            raise JudgeError(f"the judge {url} gives no answer: {reason or type(error).__name__}", False) from error
        except ValueError as error:
            raise JudgeError(f"the judge {url} answers something that is no JSON", False) from error


def find_model(server: JudgeServer) -> str:
    """Returns the name of a server's only model. Raises ConfigError where it does not tell, or has several."""
    url = f"{server.url.rstrip('/').removesuffix('/chat/completions')}/models"
    try:
        names = [model["id"] for model in server.fetch(url)["data"]]
    except (JudgeError, KeyError, TypeError) as error:
        reason = error if isinstance(error, JudgeError) else "no list of models"
        raise ConfigError(f"--judge-model must be given: {url} does not tell what there is ({reason})") from error
    if len(names) != 1:
        raise ConfigError(f"--judge-model must be given: {url} has {', '.join(names[:5]) or 'none'}")
    return names[0]


class JudgeError(Exception):
    """A judge gives no verdict. `final`: trying again would not help; `wait`: seconds that the server asks for."""

    def __init__(self, message: str, final: bool, wait: float = 0.0):
        super().__init__(message)
        self.final, self.wait = final, wait


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
    """What was found out by its content, in a file of JSON lines that is added to: found once, kept over a kill."""

    def __init__(self, path: Path):
        self._path, self._known = path, dict[str, Any]()
        if not path.exists():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        for line in lines:
            # A line that a crash of the machine damaged is found out anew.
            with suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                self._known[values["key"]] = values["value"]
        if lines and not lines[-1].endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, value: Any, **also: Any) -> None:
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
