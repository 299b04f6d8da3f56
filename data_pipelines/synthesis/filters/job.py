"""Filters: languages and lengths, near-duplicates, and speech that does not say what it should.

    OUT/kept.jsonl       documents that pass, with their own ids, their media linked into OUT
    OUT/asr.jsonl        speech too poor to learn to speak from, as documents to be transcribed
    OUT/rejected.jsonl   the others: id, where, type, cause, score, text; of a duplicate also what it repeats

Near-duplicates are found among the kept documents of all manifests, when every unit is done: the first one stays.
"""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import atomic_write
from data_pipelines.datasets.jobs.job import Job, Unit
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import plain_text, write_prompt
from data_pipelines.documents.prompts import Element, TextElement
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, MediaReference, find_media
from data_pipelines.synthesis.filters.rules import (
    ASR,
    KEPT,
    PLACES,
    REJECTED,
    FilterRules,
    Verdict,
    find_duplicates,
    judge,
    likeness,
    load_datasketch,
    sign,
)
from data_pipelines.synthesis.units import (
    SKIPPED,
    Draft,
    SynthesisTask,
    add_up,
    explain,
    join_part,
    json_line,
    manifest_units,
)
from data_pipelines.tools.commands import load_hook

NAME = "filters"
LANGUAGES = ("en", "zh", "mixed", "other")
_SIGNATURES = "signatures.npy"


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the task's own options."""
    add, default = parser.add_argument, FilterRules()
    add("--languages", nargs="+", choices=LANGUAGES, default=default.languages, help="to keep (en zh mixed)")
    add("--shortest", metavar="CHARACTERS", type=int, default=default.shortest, help="of the plain text (default 2)")
    add("--longest", metavar="CHARACTERS", type=int, default=default.longest, help="(default 1000000)")
    add("--duplicates", metavar="LIKENESS", type=float, default=default.duplicates, help="default 0.8; 0: keep all")
    add("--transcriber", metavar="MODULE:FACTORY", default="", help="checks speech: an object with transcribe")
    add("--asr-above", metavar="RATE", type=float, default=default.asr_above, help="errors of speech (default 0.1)")
    add("--reject-above", metavar="RATE", type=float, default=default.reject_above, help="(default 0.5)")


def make_job(options: Namespace) -> Job:
    """Makes the job of `options`. Raises ConfigError for rules that keep nothing, a missing hook or library."""
    rules = FilterRules(
        tuple(sorted(set(options.languages))),
        options.shortest,
        options.longest,
        options.duplicates,
        options.transcriber,
        options.asr_above,
        options.reject_above,
    )
    if not 0 <= rules.shortest <= rules.longest:
        raise ConfigError(f"--shortest {rules.shortest} must lie between 0 and --longest {rules.longest}")
    if rules.duplicates and not 0.3 <= rules.duplicates <= 1:
        raise ConfigError(f"--duplicates {rules.duplicates} is a likeness between 0.3 and 1, or 0")
    if not 0 <= rules.asr_above <= rules.reject_above:
        raise ConfigError(f"--asr-above {rules.asr_above} must lie between 0 and --reject-above {rules.reject_above}")
    if rules.transcriber:
        load_hook("--transcriber", rules.transcriber, "transcribe")
    if rules.duplicates:
        load_datasketch()
    return Job(NAME, manifest_units(NAME, options, repr(astuple(rules))), FilterDocuments(rules), options.out)


@dataclass(frozen=True)
class FilterDocuments:
    """The work on one unit: a verdict on each document by itself, and the signatures of those that pass."""

    rules: FilterRules

    def __call__(self, unit: Unit, folder: Path) -> dict:
        """Writes a unit's files; returns {"made": documents by part, "skipped" and "rejected": by cause}."""
        (folder / unit.name).mkdir()
        parts: dict[str, list[str]] = {KEPT: [], ASR: [], REJECTED: [], SKIPPED: []}
        skipped, rejected, signatures = Counter(), Counter(), []
        for number, line in enumerate(unit.content.documents()):
            where, document = f"{unit.content.name}:{line.number}", line.document
            # A verdict of each document by itself; near-duplicates need all of them and come at the end (`finish`).
            try:
                if isinstance(document, SampleError):
                    raise document
                verdict = judge(document, self.rules)
                if verdict.part == REJECTED:
                    rejected[verdict.cause] += 1
                    line = {"id": document.id, "type": document.type, "text": document.text, "where": document.location}
                    line |= {"cause": verdict.cause, "score": verdict.score}
                else:
                    draft = Draft(document, NAME, unit.name, number)
                    line, media = _carry(document, verdict, draft)
                    draft.write_media(folder)
                    if verdict.part == KEPT and self.rules.duplicates:
                        digests = [one.content_hash() for one in media]
                        signatures.append(sign(plain_text(document.text), digests))
                parts[verdict.part].append(json_line(line))
            except SampleError as error:
                skipped[error.cause] += 1
                parts[SKIPPED].append(json_line(explain(where, document, error)))
        for part, lines in parts.items():
            (folder / unit.name / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        if signatures:
            np.save(folder / unit.name / _SIGNATURES, np.stack(signatures))
        made = {part: len(parts[part]) for part in (KEPT, ASR)}
        return {"made": made, SKIPPED: dict(sorted(skipped.items())), REJECTED: dict(sorted(rejected.items()))}


def finish(job: Job, summaries: Sequence[dict]) -> dict[str, Counter]:
    """Puts the units' manifests together, near-duplicates among the rejected documents; returns the sums."""
    sums = add_up(summaries, ("made", SKIPPED, REJECTED))
    join_part(job, ASR, f"{ASR}.jsonl")
    join_part(job, SKIPPED, f"{SKIPPED}-{job.title}.jsonl")
    # Signatures of all units lie in one table, in manifest order, so that "the first" is the first of the manifests.
    counts = [one["made"][KEPT] for one in summaries]
    threshold = cast(FilterDocuments, job.work).rules.duplicates  # the job is `make_job`'s
    if threshold and sum(counts):
        first, likeness = _find_duplicates(job, counts, threshold)
    else:
        first, likeness = np.arange(sum(counts)), np.ones(sum(counts))
    # The units counted repeated documents as kept: the sums are corrected by what was found.
    repeated = _write_sorted(job, first, likeness)
    sums["made"].update({KEPT: -repeated})
    sums[REJECTED].update({"near_duplicate": repeated})
    return {key: +counter for key, counter in sums.items()}


def _find_duplicates(job: Job, counts: Sequence[int], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each kept document the number of the first one it repeats, and how like that it is."""
    path = job.out / f"{NAME}-{_SIGNATURES}.partial"
    try:
        # On disk: 512 bytes a document, which for 10^8 documents no memory holds.
        signatures = np.lib.format.open_memmap(path, "w+", np.uint32, (sum(counts), PLACES))
        start = 0
        for unit, count in zip(job.units, counts, strict=True):
            if count:
                signatures[start : start + count] = np.load(job.out / unit.name / _SIGNATURES)
            start += count
        first = find_duplicates(signatures, threshold)
        return first, likeness(signatures, np.arange(len(first)), first)
    finally:
        path.unlink(missing_ok=True)


def _write_sorted(job: Job, first: np.ndarray, likeness: np.ndarray) -> int:
    """Writes kept.jsonl and rejected.jsonl; returns how many documents repeat another."""
    # One pass: a repeated document names its original, which is always met before it.
    repeats = first != np.arange(len(first))
    originals = dict.fromkeys(first[repeats].tolist(), "")  # number -> id
    number = 0
    with atomic_write(job.out / f"{KEPT}.jsonl") as kept, atomic_write(job.out / f"{REJECTED}.jsonl") as rejected:
        for unit in job.units:
            rejected.write((job.out / unit.name / f"{REJECTED}.jsonl").read_text(encoding="utf-8"))
            with (job.out / unit.name / f"{KEPT}.jsonl").open(encoding="utf-8") as lines:
                for line in lines:
                    # Only lines of which something is needed are parsed; the others are copied as they are.
                    values = json.loads(line) if repeats[number] or number in originals else {}
                    if repeats[number]:
                        score, original = round(float(likeness[number]), 4), originals[int(first[number])]
                        reason = {"cause": "near_duplicate", "score": score, "repeats": original}
                        rejected.write(json_line({**values, **reason}))
                    else:
                        kept.write(line)
                        if number in originals:
                            originals[number] = values["id"]
                    number += 1
    return int(repeats.sum())


def _carry(document: Document, verdict: Verdict, draft: Draft) -> tuple[dict, list[Media]]:
    """Makes the line of a document whose media are linked into the output, and these media."""
    elements: list[Element] = []
    media: list[Media] = []
    for element in verdict.elements:
        if not isinstance(element, TextElement):
            media.append(find_media(element.reference, document.media))
            if not element.reference.base64:
                element = replace(element, reference=MediaReference(path=draft.link(media[-1])))
        elements.append(element)
    values = {"id": document.id, "type": verdict.type, "text": write_prompt(elements), "where": document.location}
    return values | ({} if verdict.score is None else {"score": verdict.score}), media


FILTERS = SynthesisTask(
    NAME,
    "Filters: languages and lengths, near-duplicates, and speech that does not say what it should.",
    add_arguments,
    make_job,
    finish,
)
