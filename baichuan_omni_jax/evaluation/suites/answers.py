"""The raw answers of a suite, one line an item and resumable.

    answers = AnswerFile(folder / "answers.jsonl", suite, checkpoint, settings)
    answers.fill(items, model, at_once=16)
    scores = score_suite("openaudiobench", suite, items, answers.lines(items), Judging())      # report.py

An item that cannot be asked is a line with its cause; the same command asks it again, and nothing that was answered.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import soundfile

from baichuan_omni_jax.checkpoint.provenance import flatten
from baichuan_omni_jax.config import GenerationConfig
from baichuan_omni_jax.config.generation import settings_fields
from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.evaluation.suites.items import LETTERS, Item
from baichuan_omni_jax.evaluation.suites.table import Suite, answer_text, message_of
from baichuan_omni_jax.generation.batch_requests import Question, answer_questions, encode_line
from baichuan_omni_jax.generation.chat import ChatAnswer, ChatProcessor, ChatStream
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import Event, Finished, TextDelta
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest
from baichuan_omni_jax.storage import atomic_write, take_lock

Report = Callable[[str], None]
Line = dict[str, Any]


@runtime_checkable
class SuiteModel(Protocol):
    """What answers a suite's items; `generation.chat.OmniChat` does."""

    def reply(self, messages: Sequence[Mapping[str, Any]], *, settings: Any = None, key: Any = None) -> Any: ...

    def complete(self, content: Any, *, settings: Any = None, key: Any = None) -> Any: ...

    def speak(self, text: str, *, settings: Any = None, key: Any = None) -> Any: ...


Likelihoods = Callable[[Sequence[tuple[str, Sequence[str]]]], Sequence[Sequence[float] | RequestError]]
"""Log-likelihoods, in nats, of the continuations of each text, or why a text cannot be scored."""


def engine_likelihoods(engine: Engine, processor: ChatProcessor) -> Likelihoods:
    """Returns log-likelihoods by the engine: all questions together, or, where it refuses one, each by itself."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None

    def request(text: str, endings: Sequence[str]) -> ScoringRequest:
        ids = [tokenizer.encode(ending, add_special_tokens=False).ids for ending in endings]
        return ScoringRequest(processor.encode_content(text), ids)

    def score(asked: Sequence[tuple[str, Sequence[str]]]) -> list[Sequence[float] | RequestError]:
        try:
            found = engine.log_likelihoods([request(text, endings) for text, endings in asked])
        except RequestError as error:
            if len(asked) == 1:
                return [error]
            return [row for question in asked for row in score([question])]
        return [[option.log_likelihood for option in options] for options in found]

    return score


def select_items(items: Iterator[Item], groups: Sequence[str] = (), limit: int | None = None) -> list[tuple[int, Item]]:
    """Lists a suite's items with their numbers, from 1.

    Args:
        items: all of them.
        groups: the only ones that count; none: all.
        limit: items of each group at most.

    Raises:
        ConfigError: there is no item, none that can be asked, no such group, a second of one id, or no way to read it.
    """
    try:
        return _selected(items, groups, limit)
    # Of a file its reader tells; what is left are folders without permission, and names that are too long.
    except OSError as error:
        raise ConfigError(f"the suite's files cannot be read: {error}") from error


def _selected(items: Iterator[Item], groups: Sequence[str], limit: int | None) -> list[tuple[int, Item]]:
    # All are read, chosen or not: a number means the same item whatever the limit is.
    counts: Counter[str] = Counter()
    chosen, seen = [], set()
    for number, item in enumerate(items, 1):
        if item.id in seen:
            raise ConfigError(f"the suite has two items {item.id!r}")
        seen.add(item.id)
        counts[item.group] += 1
        if (not groups or item.group in groups) and (limit is None or counts[item.group] <= limit):
            chosen.append((number, item))
    if unknown := [name for name in groups if name not in counts]:
        raise ConfigError(f"the suite has no group {unknown[0]!r}; it has {', '.join(sorted(counts))}")
    if not chosen:
        raise ConfigError("the suite has no item")
    # Rows that are all damaged are a table of something else.
    if all(item.problem for _, item in chosen):
        raise ConfigError(chosen[0][1].problem)
    return chosen


_ELSEWHERE = "another --out must be named"
_DEFAULT = "as by default"  # what lines of answers leave out of their settings


@dataclass(frozen=True)
class AnswerFile:
    """The raw answers of one suite by one checkpoint: `answers.jsonl`, and the speech of spoken ones in `audio/`.

    A line has `line` and `id` of the item, `group`, `prompt` (text, and media by name and SHA-256), `settings` (what
    differs from the defaults of `GenerationConfig`), `checkpoint`, and the answer: `text`, `finish`, `tokens`,
    `seconds`; of a choice `log_likelihoods` by letter; of speech `audio`, `audio_seconds`. A refused item: `cause`,
    `error`.
    """

    path: Path
    suite: Suite
    checkpoint: str
    settings: GenerationConfig

    def fill(
        self,
        items: Sequence[tuple[int, Item]],
        model: SuiteModel,
        likelihoods: Likelihoods | None = None,
        *,
        at_once: int = 16,
        report: Report = lambda line: None,
    ) -> None:
        """Answers what has no answer yet.

        Args:
            items: with their numbers, as `select_items` gives them.
            model: what answers.
            likelihoods: what a suite of choices by likelihood is answered by.
            at_once: items that the model has at a time.
            report: gets lines of progress.

        Raises:
            ConfigError: the file is another suite's, checkpoint's or settings', or cannot be written, or another
                program writes it.
        """
        with self.locked():
            wanted = dict(items)
            known = self._prepare(wanted)
            # Items of an earlier run beyond this one's limit stay in the file, as answered.
            others = [Question(number, name, {}) for number, name in known.items() if number not in wanted]
            questions = [Question(number, item.id, {"item": item}) for number, item in items]
            chooser = _Chooser(likelihoods) if likelihoods else None
            asker = _Asker(self, model, chooser)
            questions = sorted([*questions, *others], key=lambda question: question.line)
            answer_questions(questions, self.path, asker.ask, asker.record, at_once=at_once, report=report)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other programs out of the folder, which is made. Raises ConfigError where that cannot be."""
        # The whole folder is one run's: verdicts and recordings lie beside the answers.
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made: {error.strerror or error}") from error
        lock = take_lock(folder / "lock", f"{folder} is in use by another program")
        try:
            yield
        finally:
            lock.release()

    def lines(self, items: Sequence[tuple[int, Item]]) -> list[Line]:
        """Reads the lines of the items that have one, in the items' order."""
        found = {line["line"]: line for line in self._read()[0]}
        return [found[number] for number, _ in items if number in found]

    def _read(self) -> tuple[list[Line], bool]:
        """Reads the lines that are whole; tells also whether all are."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return [], True
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror or error}") from error
        # A kill, or a crash of the machine, leaves a part of a line, or zeros; what stands behind them is an answer.
        texts = data.split(b"\n")
        lines = [line for text in texts[:-1] if (line := _parse(text.lstrip(b"\0"))) is not None]
        clean = b"\0" not in data and not data.startswith(codecs.BOM_UTF8)
        return lines, clean and len(lines) == len(texts) - 1 and not texts[-1]

    def _prepare(self, items: Mapping[int, Item]) -> dict[int, str]:
        """Checks what is answered already, and forgets what was refused; returns id by number of the rest."""
        lines, whole = self._read()
        for line in lines:
            self._check(line, items.get(line["line"]))
        # What was refused may be mended by now; what was answered is never asked again.
        kept = {line["line"]: line for line in lines if "cause" not in line}
        # A file without any answer in it is somebody's: `answer_questions` leaves it alone, or cuts half a line off.
        if len(kept) < len(lines) or (lines and not whole):
            with atomic_write(self.path) as file:
                file.writelines(encode_line(kept[number]) for number in sorted(kept))
        return {number: line["id"] for number, line in kept.items()}

    def _check(self, line: Line, item: Item | None) -> None:
        """Raises ConfigError where a line answers something else than this run asks."""
        where = f"{self.path}: line {line['line']}"
        if item is not None and "cause" not in line and line["id"] != item.id:
            raise ConfigError(f"{where} answers {line['id']!r}, not {item.id!r}: {_ELSEWHERE}")
        # Answers of two checkpoints, or greedy and sampled ones, in one file would be a score of neither.
        asked = {"checkpoint": self.checkpoint, "settings": settings_fields(self.settings)}
        for name, value in asked.items():
            if "cause" not in line and (found := line.get(name)) != value:
                raise ConfigError(f"{where} was answered with {_difference(name, found, value)}: {_ELSEWHERE}")
        if item is not None and "cause" not in line:
            text = [part.get("text") for part in line["prompt"] if part.get("type") == "text"]
            if text != [prompt for prompt in [self.suite.prompt(item)] if prompt]:
                raise ConfigError(f"{where} has another prompt than the suite has now: {_ELSEWHERE}")


def _difference(name: str, found: Any, value: Any) -> str:
    """Says what is other than asked: of settings those alone that differ.

    >>> _difference("settings", {"top_k": 1, "max_tokens": 8}, {"top_k": 1})
    'max_tokens 8, not as by default'
    """
    if not isinstance(found, dict) or not isinstance(value, dict):
        return f"{name} {found}, not {value}"
    found, value = flatten(found), flatten(value)
    keys = [key for key in found | value if found.get(key, _DEFAULT) != value.get(key, _DEFAULT)]
    return ", ".join(f"{key} {found.get(key, _DEFAULT)}, not {value.get(key, _DEFAULT)}" for key in keys)


def _parse(text: bytes) -> Line | None:
    """Parses a line of answers; None for one that is cut, damaged or edited to what is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("line")) is not int or not isinstance(line.get("id"), str):
        return None
    if "cause" in line:
        return line if isinstance(line["cause"], str) else None
    # All that scores are made of: an answer without it is asked again.
    kinds = {"text": str, "prompt": list, "settings": dict} | ({"audio": str} if "audio" in line else {})
    fits = all(isinstance(line.get(name), kind) for name, kind in kinds.items())
    return line if fits and all(isinstance(part, dict) for part in line["prompt"]) else None


class _Asker:
    """Puts items to the model, and makes lines of the answers."""

    def __init__(self, answers: AnswerFile, model: SuiteModel, chooser: "_Chooser | None"):
        self._answers, self._model, self._chooser = answers, model, chooser
        self._shown: dict[int, list[dict[str, Any]]] = {}

    def ask(self, question: Question) -> ChatStream:
        item, suite, settings = question.values["item"], self._answers.suite, self._answers.settings
        if item.problem:
            raise RequestError("bad_item", item.problem)
        # Media are read here, one item at a time: a file that is missing or damaged is this item's alone.
        content, self._shown[question.line] = message_of(suite, item)
        # The key follows from the item: a sampled answer is the same however often the run was stopped.
        key = jax.random.fold_in(jax.random.key(0), question.line)
        # Each task has the form of prompt that the checkpoint was trained with.
        if suite.task == "choose":
            assert self._chooser is not None
            return ChatStream(self._chooser.add(question.line, item, suite.prompt(item)), None)
        if suite.task == "transcribe":
            return self._model.complete(content, settings=settings, key=key)
        if suite.task == "speak":
            return self._model.speak(suite.prompt(item), settings=settings, key=key)
        return self._model.reply([{"role": "user", "content": content}], settings=settings, key=key)

    def record(self, question: Question, answer: ChatAnswer) -> Line:
        item, finished = question.values["item"], answer.finished
        line = {
            "group": item.group,
            "prompt": self._shown.pop(question.line),
            "settings": settings_fields(self._answers.settings),
            "checkpoint": self._answers.checkpoint,
            "text": answer.text,
            "finish": finished.finish_reason,
            "tokens": finished.tokens,
            "seconds": round(answer.seconds, 3),
        }
        if self._chooser is not None:
            line["log_likelihoods"] = self._chooser.scores.pop(question.line)
        if len(answer.samples):
            # Named by the number, so that a restart writes the same file again.
            path = self._answers.path.parent / "audio" / f"{question.line:06d}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, answer.samples, answer.rate)
            line |= {"audio": f"audio/{path.name}", "audio_seconds": round(answer.audio_seconds, 3)}
        return line


class _Chooser:
    """Chooses the likeliest letter of several questions at a time: whoever's answer is waited for first, all that are
    in line are computed together.
    """

    def __init__(self, likelihoods: Likelihoods):
        self._likelihoods, self._waiting = likelihoods, dict[int, tuple[Item, str]]()
        self._found = dict[int, Sequence[float] | RequestError]()
        self.scores: dict[int, dict[str, float]] = {}

    def add(self, number: int, item: Item, prompt: str) -> "_Choice":
        self._waiting[number] = item, prompt
        return _Choice(self, number)

    def chosen(self, number: int) -> str:
        """The likeliest letter. Raises RequestError where the question cannot be scored."""
        # Items are put in line before the first is waited for: one call scores all of them.
        if number not in self._found:
            waiting, self._waiting = self._waiting, {}
            asked = [
                (prompt, [answer_text(letter) for letter in LETTERS[: len(item.options)]])
                for item, prompt in waiting.values()
            ]
            self._found |= zip(waiting, self._likelihoods(asked), strict=True)
        found = self._found.pop(number)
        if isinstance(found, RequestError):
            raise found
        self.scores[number] = {letter: float(value) for letter, value in zip(LETTERS, found, strict=False)}
        return max(self.scores[number], key=self.scores[number].__getitem__)


class _Choice:
    """The answer of one question to a `_Chooser`, as the events of a generated one."""

    def __init__(self, chooser: _Chooser, number: int):
        self._chooser, self._number = chooser, number

    def __iter__(self) -> Iterator[Event]:
        # The work is done by the first event, in the thread that waits for it.
        yield TextDelta(self._chooser.chosen(self._number), (), ())
        yield Finished("end", 0, 0, 0, None, None, 0.0, np.zeros(0, np.int32))

    def cancel(self) -> None:
        """Nothing runs that could be ended."""
