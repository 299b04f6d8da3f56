"""A seqio Task or Mixture as a data set of token ids, without TensorFlow after.

    baichuan-omni data import-seqio --mixture omni_mixture \\
        --module data_pipelines.datasets.importers.seqio_tasks \\
        --tokenizer tokenizer.json --out data/omni_mixture --documents 20000

OUT becomes a source of `data.mixture` like any built data set. It holds ids: a run with another tokenizer refuses it. A
document is an example's `targets`, which carry loss, after its `inputs` (if it has any), which do not; its type is its
task. Tasks come by the mixture's rates, exact to a document or two of each in each shard; a task that has come to its
end begins again. Shards are the units of work: stopped, the same command does those that are left.
"""

import argparse
import importlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage.given import given_folder
from data_pipelines.datasets.builder.build import remove_outdated
from data_pipelines.datasets.jobs.job import Job, Runner, Unit, folder_lock, refuse_foreign, run_job
from data_pipelines.datasets.shards import SUFFIX, ShardFile, ShardWriter, write_description
from data_pipelines.documents.document import Document, pack_ids
from data_pipelines.tokenizers.tokenizer import (
    TOKENS_END,
    TOKENS_START,
    TRAINABLE_END,
    TRAINABLE_START,
    load_tokenizer,
    tokenizer_fingerprint,
)
from data_pipelines.tools.commands import add_runner_arguments, run_command, run_job_command, runner_from_options

LOCK = "seqio"
SHARD_DOCUMENTS = 10_000
_FEATURES = ("inputs", "targets")


@dataclass(frozen=True)
class Recipe:
    """What is cached: a Task's or Mixture's name, the modules that register it, and what decides its examples."""

    mixture: str
    modules: tuple[str, ...]
    tokenizer: str
    split: str = "train"
    seed: int | None = None

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer."""
        return tokenizer_fingerprint(load_tokenizer(self.tokenizer))


@dataclass(frozen=True)
class CacheShard:
    """The work: one shard's documents. TensorFlow is imported in the process that does it."""

    recipe: Recipe

    def __call__(self, unit: Unit, folder: Path) -> dict:
        # Every shard has its own part of every task, so that shards are independent and none repeats another.
        number, shards, documents = unit.content
        rates = load_rates(self.recipe)
        streams = {task: _examples(task, self.recipe, number, shards, documents is None) for task in rates}
        counts, tokens, fingerprint = Counter(), 0, self.recipe.fingerprint
        with ShardWriter(folder / f"{unit.name}{SUFFIX}") as writer:
            for task in deal(rates, documents):
                example = next(streams[task], None)
                if example is None:
                    if documents is None:
                        break
                    raise ConfigError(
                        f"task {task} has no example in part {number + 1} of {shards}: ask for fewer shards"
                    )
                where = f"{self.recipe.mixture}/{self.recipe.split} {unit.name}:{writer.documents}"
                writer.write(*document_of(example, task, where, fingerprint))
                counts[task] += 1
                tokens += sum(len(example.get(name, ())) for name in _FEATURES)
        return {"documents": dict(counts), "tokens": tokens}


def deal(rates: Mapping[str, float], documents: int | None) -> Iterator[str]:
    """Yields the task of each of `documents` documents (None: endless): next is the one furthest behind its rate.

    >>> "".join(deal({"a": 3.0, "b": 1.0}, 8))
    'aaabaaab'
    """
    # Fractions: in floating point a tie would be decided by rounding, and the order by the machine.
    exact = {task: Fraction(rate) for task, rate in rates.items()}
    due = {task: 1 / rate for task, rate in exact.items()}
    place = 0
    while documents is None or place < documents:
        task = min(due, key=due.__getitem__)
        due[task] += 1 / exact[task]
        place += 1
        yield task


def document_of(
    example: Mapping[str, Any], task: str, where: str, fingerprint: str
) -> tuple[Document, dict[str, bytes]]:
    """Writes an example as a document that refers to its ids, and the ids.

    Args:
        example: token ids (n,) under `targets` and, perhaps, `inputs`.
        task: the document's type.
        where: mixture, split, shard and record, from which its id is made.
        fingerprint: of the tokenizer, which the ids carry along.

    Returns:
        The document, whose text names the ids as media, and the bytes of these media.
    """
    media = {name: pack_ids(example[name], fingerprint) for name in _FEATURES if len(example.get(name, ()))}
    tags = {name: f'{TOKENS_START}{{"path": "{name}"}}{TOKENS_END}' for name in media}
    text = f"{tags.get('inputs', '')}{TRAINABLE_START}{tags.get('targets', '')}{TRAINABLE_END}"
    return Document(where.replace(" ", "-"), task, text, where, {}), media


def load_rates(recipe: Recipe) -> dict[str, float]:
    """Returns the tasks of the recipe and their rates. Raises ConfigError for names that nobody registered, features
    that are not ours, and another vocabulary.
    """
    # Importing registers: tasks are found by name only afterwards.
    seqio = _import_seqio(recipe)
    try:
        provider = seqio.get_mixture_or_task(recipe.mixture)
    except ValueError as error:
        known = ", ".join(sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})) or "none"
        raise ConfigError(f"no task or mixture {recipe.mixture!r} is registered; there are {known}") from error
    tasks = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    for task in tasks:
        _check_task(task, recipe)
    return {task.name: float(provider.get_rate(task)) if len(tasks) > 1 else 1.0 for task in tasks}


def _check_task(task: Any, recipe: Recipe) -> None:
    if recipe.split not in task.splits:
        raise ConfigError(f"task {task.name} has no split {recipe.split!r}; it has {', '.join(task.splits)}")
    unknown = [name for name in task.output_features if name not in _FEATURES]
    if unknown or "targets" not in task.output_features:
        raise ConfigError(f"task {task.name} gives {', '.join(task.output_features)}; targets, and inputs, are read")
    for name, feature in task.output_features.items():
        if getattr(feature.vocabulary, "fingerprint", "") != recipe.fingerprint:
            raise ConfigError(f"task {task.name}: {name} has another vocabulary than {recipe.tokenizer}")


def _examples(task: str, recipe: Recipe, number: int, shards: int, once: bool) -> Iterator[dict]:
    """Part `number` of a task's examples in the order of its source, over and over or `once`."""
    import seqio

    dataset = seqio.get_mixture_or_task(task).get_dataset(
        sequence_length=None,
        split=recipe.split,
        shuffle=False,  # training shuffles all of it
        seed=recipe.seed,
        shard_info=seqio.ShardInfo(index=number, num_shards=shards) if shards > 1 else None,
        num_epochs=1 if once else None,
        try_in_mem_cache=False,
    )
    return dataset.as_numpy_iterator()


def _import_seqio(recipe: Recipe) -> Any:
    """seqio, with the recipe's modules imported. Raises ConfigError."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["OMNI_TOKENIZER"] = recipe.tokenizer
    try:
        import seqio
    except ImportError as error:
        raise ConfigError("seqio is missing: pip install 'baichuan_omni_jax[seqio]'") from error
    for module in recipe.modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # it is the user's
            raise ConfigError(f"--module {module} cannot be imported: {error}") from error
    return seqio


def cache(recipe: Recipe, out: Path, documents: int | None, shards: int, runner: Runner) -> dict:
    """Caches a Task or Mixture as a data set of token ids.

    Args:
        recipe: what is cached, and with which tokenizer.
        out: the data set's folder.
        documents: how many in all; None, of a Task alone: every example once.
        shards: how many files; 0: one for `SHARD_DOCUMENTS`.
        runner: does the shards.

    Returns:
        What `dataset.json` holds besides the shards: documents of each task, rates, tokens.

    Raises:
        ConfigError: for a mixture without `documents`, fewer documents than shards, and as `load_rates`.
    """
    rates = load_rates(recipe)
    if documents is None and len(rates) > 1:
        raise ConfigError(f"{recipe.mixture} is a mixture, which has no end: say how many --documents")
    shards = shards or math.ceil((documents or 1) / SHARD_DOCUMENTS)
    if shards < 1 or (documents is not None and documents < shards):
        raise ConfigError(f"{documents} documents cannot fill {shards} shards")
    refuse_foreign(out, LOCK)
    job = Job(f"caching {recipe.mixture}", _units(recipe, rates, documents, shards), CacheShard(recipe), out)
    with folder_lock(out, LOCK, job.title):
        remove_outdated(job)
        return _describe(recipe, rates, job, run_job(job, runner))


def _describe(recipe: Recipe, rates: Mapping[str, float], job: Job, summaries: Sequence[dict]) -> dict:
    """Writes `dataset.json`; returns what it holds besides the shards."""
    # As any built data set, with the tokenizer of its ids: a run with another one refuses it.
    files, counts = job.files(), Counter()
    for summary in summaries:
        counts.update(summary["documents"])
    written = [
        ShardFile(f"{unit.name}{SUFFIX}", sum(summary["documents"].values()), *files[f"{unit.name}{SUFFIX}"])
        for unit, summary in zip(job.units, summaries, strict=True)
    ]
    details = {
        "tokenizer": recipe.fingerprint,
        "mixture": recipe.mixture,
        "split": recipe.split,
        "rates": rates,
        "documents": counts.total(),
        "tasks": dict(sorted(counts.items())),
        "tokens": sum(summary["tokens"] for summary in summaries),
    }
    write_description(job.out, written, details)
    return details


def _units(recipe: Recipe, rates: Mapping[str, float], documents: int | None, shards: int) -> list[Unit]:
    units = []
    for number in range(shards):
        share = None if documents is None else documents * (number + 1) // shards - documents * number // shards
        # All that decides a shard's documents: a shard is cached again when any of it changes.
        decides = [recipe.mixture, recipe.modules, recipe.split, recipe.seed, recipe.fingerprint, dict(rates)]
        decides += [number, shards, share]
        units.append(Unit(f"documents-{number:05d}", repr(decides), (number, shards, share), share or 1))
    return units


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    add = parser.add_argument
    add("--mixture", required=True, metavar="NAME", help="a registered Mixture or Task")
    add("--module", action="append", default=[], metavar="M", help="a module that registers it; may be repeated")
    add("--tokenizer", required=True, metavar="FILE", help="the tokenizer.json that training will use (data.tokenizer)")
    add("--out", required=True, type=given_folder, metavar="DIR", help="the data set's folder")
    add("--split", default="train", metavar="NAME", help="of the mixture (default %(default)s)")
    add("--documents", type=int, metavar="N", help="how many in all (default, of a Task: every example once)")
    add("--shards", type=int, default=0, metavar="N", help=f"files (default: one for {SHARD_DOCUMENTS} documents)")
    add("--seed", type=int, help="of sources and preprocessors that draw; they must take one")
    add_runner_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, 2 with one sentence when something given cannot be used, 130 after Ctrl-C."""
    return run_job_command(lambda: _cache(arguments), arguments.out)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command by itself; returns the exit code."""
    return run_command("import-seqio", __doc__, add_arguments, run, arguments)


def _cache(options: argparse.Namespace) -> None:
    recipe = Recipe(options.mixture, tuple(options.module), options.tokenizer, options.split, options.seed)
    summary = cache(recipe, options.out, options.documents, options.shards, runner_from_options(options))
    counts = f"{summary['documents']} documents, {summary['tokens']} tokens"
    print(f"{options.out}: {counts} of tokenizer {summary['tokenizer']}")
    whole = sum(summary["rates"].values())
    for task, count in summary["tasks"].items():
        share, rate = count / summary["documents"], summary["rates"][task] / whole
        print(f"  {task:<30}{count:>10}  {share:.4f} (rate {rate:.4f})")


if __name__ == "__main__":
    sys.exit(main())
