"""Public benchmarks while training: the live weights answer the suites of `eval.suites` every `eval.suite_every` steps.

suite/NAME/score  suite/NAME/items                     in metrics.jsonl: percent, of all items that count
WORKDIR/suites/STEP/NAME/answers.jsonl, scores.json    as `baichuan-omni evaluate --suite` writes them

Suites that are scored by a recognizer of somebody else's, or spoken answers, are for that command.
"""

import logging
import time
from pathlib import Path
from typing import cast, get_args

import jax
from etils import epath
from rich.console import Console
from tokenizers import Tokenizer

from baichuan_omni_jax.checkpoint import find_tokenizer
from baichuan_omni_jax.config import GenerationConfig, OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.answers import AnswerFile, engine_likelihoods, select_items
from baichuan_omni_jax.evaluation.suites.items import Item
from baichuan_omni_jax.evaluation.suites.judge_server import JudgeServer, find_model
from baichuan_omni_jax.evaluation.suites.judges import CachedJudge
from baichuan_omni_jax.evaluation.suites.report import (
    Judging,
    Rule,
    SuiteScores,
    score_suite,
    table_of,
    write_scores,
)
from baichuan_omni_jax.evaluation.suites.table import Suite, find_suite
from baichuan_omni_jax.generation.chat import ChatModel, OmniChat
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.storage import is_url, parse_path
from baichuan_omni_jax.storage.given import local_copy
from baichuan_omni_jax.train.ability_hook import is_answer_step, live_engine
from baichuan_omni_jax.train.hooks import Hook, RunProgress
from baichuan_omni_jax.train.metrics import MetricsRecord
from baichuan_omni_jax.train.run_data import load_audio_tokenizer
from baichuan_omni_jax.train.state import StepSpec
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor

log = logging.getLogger(__name__)

SUITES_FOLDER = "suites"
_LENGTH = 4096  # items of a prompt and its answer, at least: solved questions of an exam are longer than a toy row


def check_suites(run: RunConfig) -> dict[str, Suite]:
    """Returns the suites of a run by name. Raises ConfigError for one that there is not, or that it cannot answer."""
    suites = {}
    for name in run.eval.suites:
        try:
            suites[name] = suite = find_suite(name)
        except ConfigError as error:
            raise ConfigError(f"eval.suites: {error}") from error
        if suite.task == "speak":
            raise ConfigError(f"eval.suites {name} is scored by a recognizer: baichuan-omni evaluate --suite {name}")
        # Recorded questions become codes by the run's audio tokenizer, whether or not it trains.
        if missing := [branch for branch in suite.branches if branch not in (*run.branches, "audio_encoder")]:
            raise ConfigError(f"eval.suites {name} needs the branch {missing[0]}, which the run does not have")
        folder = _suite_folder(run, suite)
        if not folder.is_dir():
            raise ConfigError(f"eval.suites {name}: {folder} is no folder (eval.suite_data)")
    return suites


def read_suites(run: RunConfig) -> dict[str, list[tuple[int, Item]]]:
    """Returns the items of a run's suites, with their numbers. Raises ConfigError naming the suite and the file."""
    items = {}
    for name, suite in check_suites(run).items():
        folder = _suite_folder(run, suite)
        try:
            items[name] = select_items(suite.read(folder), limit=run.eval.suite_items or None)
        except ConfigError as error:
            # A reader speaks of the command's flag.
            raise ConfigError(f"eval.suites {name}: {str(error).removeprefix('--data ')} (eval.suite_data)") from error
    return items


def _suite_folder(run: RunConfig, suite: Suite) -> Path:
    """Returns the folder of a suite's files, of a URL a copy on this machine."""
    place = parse_path(run.eval.suite_data) / suite.folder
    return local_copy(place) if is_url(place) else Path(place)


class SuiteHook(Hook):
    """Puts the suites of `eval.suites` to the weights every `eval.suite_every` steps, and after the last one.

    Args:
        spec: the run's step.
        omni: the model's sizes.
        tokenizer_json: the text tokenizer.
        workdir: the run's, which keeps the audio tokenizer.
        folder: where answers go: the workdir, or a local copy of what is there.
        console: where tables go.
    """

    doing, scores = "asking suites", True

    def __init__(
        self,
        spec: StepSpec,
        omni: OmniConfig,
        tokenizer_json: str,
        *,
        workdir: epath.Path,
        folder: Path,
        console: Console,
    ) -> None:
        self._spec, self._omni, self._run = spec, omni, spec.task.run
        self._suites = check_suites(self._run)
        self._workdir, self._folder, self._console, self._json = workdir, folder, console, tokenizer_json
        # Read before the first step: a file that cannot be used ends the run before it begins.
        self._items = read_suites(self._run)
        self._judge: JudgeServer | Rule = find_judge(self._run.eval.suite_judge) if self._suites else "none"

    def is_due(self, step: int) -> bool:
        return bool(self._suites) and is_answer_step(step, self._run.eval.suite_every, self._run.train.steps)

    def measure(self, progress: RunProgress) -> MetricsRecord:
        began = time.perf_counter()
        record: MetricsRecord = {}
        try:
            engine, chat = self._open(progress)
            for name in self._suites:
                scores = self._answer(name, progress.step, engine, chat)
                self._console.print(table_of(scores), markup=False)
                if scores.groups[0].value is not None:
                    record |= {f"suite/{name}/score": scores.groups[0].value}
                record |= {f"suite/{name}/items": scores.groups[0].items}
        except Exception as error:  # a measurement must not end a run; what is answered is kept
            log.exception("suites could not be answered after step %d", progress.step)
            self._console.print(f"suites after step {progress.step} could not be answered: {error}", markup=False)
        self._console.print(f"suites after step {progress.step}: {time.perf_counter() - began:.1f} s")
        return record

    def _open(self, progress: RunProgress) -> tuple[Engine, OmniChat]:
        tokenizer = Tokenizer.from_str(self._json)
        processor = Processor(self._omni, tokenizer, images=self._run.data.images)
        branches = {}
        if any("audio_encoder" in suite.branches for suite in self._suites.values()):
            home = find_tokenizer(self._run, self._workdir)
            with jax.set_mesh(self._spec.mesh):
                branches["audio_encoder"] = load_audio_tokenizer(self._run, self._omni, self._spec.mesh, home)
        length = max(self._run.data.budgets.tokens, _LENGTH)
        engine = live_engine(self._spec, progress.state, self._omni, tokenizer, length, branches)
        return engine, OmniChat(ChatModel(engine, self._omni, None), ChatPrompts(processor))

    def _answer(self, name: str, step: int, engine: Engine, chat: OmniChat) -> SuiteScores:
        suite, items = self._suites[name], self._items[name]
        settings = GenerationConfig(max_tokens=suite.max_tokens).greedy()
        folder = self._folder / SUITES_FOLDER / str(step) / name
        answers = AnswerFile(folder / "answers.jsonl", suite, f"{self._workdir} step {step}", settings)
        processor = chat.processor
        assert processor is not None
        likelihoods = engine_likelihoods(engine, processor) if suite.task == "choose" else None
        answers.fill(items, chat, likelihoods)
        lines = answers.lines(items)
        judge = self._judge
        judging = Judging(
            judge=CachedJudge(judge, folder / "verdicts.jsonl") if isinstance(judge, JudgeServer) else judge
        )
        scores = score_suite(name, suite, items, lines, judging)
        write_scores(folder / "scores.json", scores)
        return scores


def find_judge(judge: str) -> JudgeServer | Rule:
    """The judge that `eval.suite_judge` names. Raises ConfigError where it cannot be used."""
    if judge in get_args(Rule):
        return cast(Rule, judge)
    if not judge.startswith(("http://", "https://")):
        raise ConfigError(f"eval.suite_judge {judge!r} is no URL, and none of {', '.join(get_args(Rule))}")
    server = JudgeServer(url=judge, model="", key="OPENAI_API_KEY")
    try:
        server.check()
    except ConfigError as error:
        raise ConfigError(f"eval.suite_judge: {error}") from error
    try:
        return JudgeServer(url=judge, model=find_model(server), key="OPENAI_API_KEY")
    except ConfigError as error:
        raise ConfigError(f"eval.suite_judge {judge} does not tell which model it serves: {error}") from error
