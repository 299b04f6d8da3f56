"""Abilities measured while training: the live weights answer held-out questions, on the mesh that they train on.

ability/NAME/accuracy or cer, wer, chance, items   in metrics.jsonl, after the steps of `eval.ability_every`
WORKDIR/abilities.json                             the same by step, with intervals and causes
WORKDIR/abilities/STEP.jsonl                       every question's reference and answer, as text

The engine has a copy of the language model and the audio head in the layout of decoding while it answers, and of no
other branch (docs/decisions/0105). Nothing of the run's state is touched.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.abilities import (
    AbilityScore,
    Answer,
    Question,
    ability_table,
    ask,
    longest,
    score_answers,
)
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.events import Prompt
from baichuan_omni_jax.nn.linear import put_rows
from baichuan_omni_jax.nn.param import with_values
from baichuan_omni_jax.sharding import axis_product
from baichuan_omni_jax.storage import atomic_write, write_json
from baichuan_omni_jax.train.hooks import Hook, RunProgress
from baichuan_omni_jax.train.metrics import MetricsRecord
from baichuan_omni_jax.train.state import StepSpec, TrainState, branches_of, evaluation_values

log = logging.getLogger(__name__)

ABILITIES = "abilities.json"
_SLOTS = 16  # questions that are answered at a time, at least
_CHUNK = 64  # items of prompts that are read at a time: few sizes of chunks are few programs to compile


@runtime_checkable
class AskableData(Protocol):
    """A held-out mixture whose documents can be asked."""

    sources: tuple[str, ...]

    def questions(self, source: str, limit: int) -> tuple[Sequence[Question], Counter]:
        """Returns the first `limit` documents of a source as questions, and why others are none, counted."""
        ...

    def recognition_prompt(self, codes: np.ndarray) -> Prompt:
        """Encodes the request to transcribe code frames."""
        ...


def check_answers(run: RunConfig) -> None:
    """Raises ConfigError where `eval.abilities` or `eval.suites` cannot be answered in this run."""
    wanted = run.eval
    mixtures = [mixture.name for mixture in wanted.mixtures]
    if unknown := [name for name in wanted.abilities if name not in mixtures]:
        known = ", ".join(mixtures) or "none"
        raise ConfigError(f"eval.abilities {unknown[0]!r} is not one of eval.mixtures ({known})")
    names = [source.name for each in wanted.mixtures if each.name in wanted.abilities for source in each.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"eval.abilities: two sources are called {twice[0]}; an ability goes by its source's name")
    if run.task != "omni" and (swapped := [mixture.name for mixture in wanted.mixtures if mixture.swapped]):
        raise ConfigError(f"eval.mixtures {swapped[0]}: swapped is of task omni, not {run.task}")
    for field in ("abilities", "suites"):
        if not getattr(wanted, field):
            continue
        if run.task != "omni":
            raise ConfigError(f"eval.{field}: task {run.task} has no language model that answers")
        if jax.process_count() > 1:
            raise ConfigError(f"eval.{field}: one host answers alone; a run on several has --set 'eval.{field}=()'")
        if run.mesh.context != 1:
            raise ConfigError(
                f"eval.{field} needs mesh.context 1, not {run.mesh.context}: an answer's row is not split"
            )
    least_values = {"every": 0, "steps": 0, "ability_every": 0, "ability_items": 1, "suite_every": 0, "suite_items": 0}
    for field, least in least_values.items():
        if getattr(wanted, field) < least:
            raise ConfigError(f"eval.{field} must be at least {least}, not {getattr(wanted, field)}")


def is_answer_step(step: int, every: int, steps: int) -> bool:
    """Whether the weights answer after `step`: every so many, and after the last one of the run."""
    return step > 0 and (step == steps or (every > 0 and step % every == 0))


def live_branches(spec: StepSpec, state: TrainState) -> dict[str, nnx.Module]:
    """Returns the run's branches as they are now, to be answered by: the arrays of the state, none of them copied.

    Only tables of which single rows train are put together.
    """
    values = evaluation_values(spec, state)
    for table, name in spec.groups.rows.items():
        values[table] = put_rows(values[table], values[name], spec.special_ids)
    branches = branches_of(with_values(spec.template, values))
    return {name: branches[name] for name in ("llm", "vision", "audio_head") if name in branches}


def live_engine(
    spec: StepSpec,
    state: TrainState,
    omni: OmniConfig,
    tokenizer: Tokenizer,
    length: int,
    others: Mapping[str, nnx.Module] | None = None,
) -> Engine:
    """Makes an engine of the weights as they are now.

    Args:
        spec: the run's step.
        state: the state after some step.
        omni: the model's sizes.
        tokenizer: the text tokenizer.
        length: items that a prompt and its answer have together, at most.
        others: branches that the run does not train, such as the audio encoder that makes the codes of recordings.
    """
    # As many slots on every device; sizes by powers of two, so that few programs are compiled.
    devices = axis_product(spec.mesh, spec.task.compute.rules.axes("batch"))
    slots = -(-_SLOTS // devices) * devices
    size = 1 << (length - 1).bit_length()
    branches = live_branches(spec, state) | dict(others or {})
    return Engine(branches, omni, tokenizer, slots=slots, length=size, chunk=min(_CHUNK, size))


class AbilityHook(Hook):
    """Asks the abilities of `eval.abilities` every `eval.ability_every` steps, and after the last one.

    Args:
        spec: the run's step.
        omni: the model's sizes.
        mixtures: the held-out data by name.
        tokenizer_json: the text tokenizer.
        workdir: where scores and answers go.
        console: where the table and the time go.
        first_step: where the run goes on: what was written of later steps is dropped.
        gains: returns the newest held-out scores, by their keys.
    """

    doing, scores = "asking abilities", True

    def __init__(
        self,
        spec: StepSpec,
        omni: OmniConfig,
        mixtures: Mapping[str, Any],
        tokenizer_json: str,
        *,
        workdir: Path,
        console: Console,
        first_step: int,
        gains: Callable[[], Mapping[str, float]],
    ) -> None:
        self._spec, self._omni, self._config = spec, omni, spec.task.run.eval
        self._mixtures = {name: mixtures[name] for name in self._config.abilities}
        self._steps, self._workdir, self._console, self._gains = spec.task.run.train.steps, workdir, console, gains
        self._tokenizer = Tokenizer.from_str(tokenizer_json) if self._mixtures else None
        self._questions: dict[str, Sequence[Question]] | None = None
        self._mixture_of: dict[str, str] = {}
        self._left_out: dict[str, Counter] = {}
        self._scores: dict[str, AbilityScore] = {}
        self._by_step = _read_scores(workdir / ABILITIES, first_step) if self._mixtures else {}

    def is_due(self, step: int) -> bool:
        return bool(self._mixtures) and is_answer_step(step, self._config.ability_every, self._steps)

    def measure(self, progress: RunProgress) -> MetricsRecord:
        began = time.perf_counter()
        questions = self._read_questions()
        if not questions:
            return {}
        try:
            answers = self._answers(progress, questions)
        except Exception as error:  # such as no memory for the engine: a measurement must not end a run
            log.exception("abilities could not be measured after step %d", progress.step)
            self._console.print(f"abilities after step {progress.step} could not be measured: {error}")
            return {}
        self._scores = {}
        for name, asked in questions.items():
            score = score_answers(asked, answers[name], self._left_out[name])
            if score is not None:
                gain = self._gains().get(f"eval/{self._mixture_of[name]}/{name}/media_gain")
                self._scores[name] = replace(score, media_gain=gain)
        self._write(progress.step, questions, answers)
        items = sum(len(asked) for asked in questions.values())
        seconds = time.perf_counter() - began
        self._console.print(f"abilities after step {progress.step}: {items} questions in {seconds:.1f} s")
        return {
            f"ability/{name}/{key}": value
            for name, score in self._scores.items()
            for key, value in score.metrics().items()
        }

    def finish(self, progress: RunProgress) -> None:
        # A run that was stopped before its end has a table of an earlier step, or none.
        if self._scores:
            step = max(self._by_step)
            self._console.print(ability_table(self._scores, f"held-out abilities after step {step}"))

    def _answers(self, progress: RunProgress, questions: Mapping[str, Sequence[Question]]) -> dict[str, list[Answer]]:
        assert self._tokenizer is not None
        engine = live_engine(self._spec, progress.state, self._omni, self._tokenizer, longest(questions))
        recognition = {name: self._mixtures[self._mixture_of[name]].recognition_prompt for name in questions}
        return ask(engine, questions, recognition)

    def _read_questions(self) -> dict[str, Sequence[Question]]:
        """Reads the questions once; those that a document cannot be are told once, with their causes."""
        if self._questions is not None:
            return self._questions
        self._questions = {}
        for mixture, data in self._mixtures.items():
            for source in data.sources:
                found, left_out = data.questions(source, self._config.ability_items)
                self._left_out[source], self._mixture_of[source] = left_out, mixture
                if left_out:
                    causes = ", ".join(f"{count} {cause}" for cause, count in left_out.most_common())
                    self._console.print(f"ability {source}: {left_out.total()} documents cannot be asked ({causes})")
                if found:
                    self._questions[source] = found
        return self._questions

    def _write(
        self, step: int, questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Sequence[Answer]]
    ) -> None:
        self._by_step[step] = {name: score.as_json() for name, score in self._scores.items()}
        write_json(self._workdir / ABILITIES, {"steps": {str(at): self._by_step[at] for at in sorted(self._by_step)}})
        lines = [
            {
                "ability": name,
                "document": question.location,
                "asked": question.asked,
                "reference": question.reference,
                "answer": answer.text,
            }
            | ({"frames": answer.frames} if question.frames else {})
            | ({"cause": answer.problem} if answer.problem else {})
            for name, asked in questions.items()
            for question, answer in zip(asked, answers[name], strict=True)
        ]
        folder = self._workdir / "abilities"
        folder.mkdir(exist_ok=True)
        with atomic_write(folder / f"{step}.jsonl") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _read_scores(path: Path, until: int) -> dict[int, dict[str, Any]]:
    """Reads the scores of the steps up to `until`; those of a file that is no such thing are none."""
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
        return {int(step): scores for step, scores in steps.items() if int(step) <= until}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
