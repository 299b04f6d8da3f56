"""What a finished model can do: a run's held-out questions put to any checkpoint, with its answers to look at and hear.

OUT/abilities.json     scores, as a run itself writes them, of more questions
OUT/samples.jsonl      every question with its media, reference and answer (`evaluation/samples.py`)
OUT/speech/, media/    spoken answers; media that are no files of their own
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from etils import epath
from rich.console import Console

from baichuan_omni_jax.checkpoint import find_checkpoint, find_tokenizer
from baichuan_omni_jax.checkpoint.provenance import RUN_CONFIG
from baichuan_omni_jax.config import MeshConfig, RunConfig, from_dict, resolve_model
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.abilities import (
    Answer,
    Question,
    Recognition,
    ability_table,
    ask,
    kind_of,
    longest,
    score_answers,
)
from baichuan_omni_jax.evaluation.chain_record import ABILITIES, METRICS, is_stage_file, read_metrics, read_scores
from baichuan_omni_jax.evaluation.samples import SAMPLES, Sample, write_samples
from baichuan_omni_jax.evaluation.suites.scoring import exact_match
from baichuan_omni_jax.generation.chat_stream import SpeechSynthesizer
from baichuan_omni_jax.generation.loading import load_for_generation, make_chat_model
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.storage import is_url, read_json_object, write_json
from baichuan_omni_jax.storage.given import local_copy
from baichuan_omni_jax.train.run_data import MixtureData, open_run_data
from data_pipelines.documents.prompts import AudioElement, ImageElement, VideoElement
from data_pipelines.documents.sequence import document_elements
from data_pipelines.errors import SampleError
from data_pipelines.held_out import HeldOutMixture
from data_pipelines.media.audio import read_audio
from data_pipelines.media.location import Media, find_media
from data_pipelines.packing.rows import ALL_ROWS
from data_pipelines.tokenizers.tokenizer import load_tokenizer

_SLOTS = 16  # questions that are answered at a time
_RECORDING_RATE = 24000  # Hz, of recordings that are joined: what the model speaks at
_KINDS = {ImageElement: "image", VideoElement: "video", AudioElement: "audio"}


@dataclass(frozen=True, kw_only=True)
class AskedRun:
    """The abilities of a run: their questions, where their media are, and how speech is asked to be transcribed."""

    run: RunConfig
    questions: Mapping[str, Sequence[Question]]
    left_out: Mapping[str, Counter]
    recognition: Mapping[str, Recognition]
    media: Mapping[str, "AskedMedia"]  # by the question's location


@dataclass(frozen=True)
class AskedMedia:
    """Files of a question: (kind, path) of what it shows and plays, and the recording of its answer, "" without one."""

    shown: tuple[tuple[str, str], ...] = ()
    recording: str = ""


def evaluate_run(workdir: epath.Path, checkpoint: str, out: Path, items: int, console: Console) -> None:
    """Asks a run's abilities and writes what came of it.

    Args:
        workdir: the run, whose `eval.abilities` are asked; may be a URL.
        checkpoint: what answers: as in `generate`, by branch too. "": the run's newest step.
        out: the folder to write; its `abilities.json` is the last file.
        items: questions of each ability at most.
        console: where the table goes.

    Raises:
        ConfigError: there is no such run, it has no abilities, the folder cannot be made, or the checkpoint cannot be
            used.
    """
    step = find_checkpoint(workdir).name
    if not step.isdecimal():
        raise ConfigError(f"{workdir} is a checkpoint: the workdir of the run that made it has its questions")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror or error}") from error
    # Answers first: loading all branches takes memory that the audio encoder needs as well.
    asked = read_questions(workdir, out, items)
    loaded = load_for_generation(checkpoint or str(workdir), mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    if loaded.tokenizer is None:
        raise ConfigError(f"checkpoint {checkpoint or workdir} brings no text tokenizer")
    size = 1 << (longest(asked.questions) - 1).bit_length()
    model = make_chat_model(loaded, load_tokenizer(loaded.tokenizer), slots=_SLOTS, length=size)
    answers = ask(model.engine, asked.questions, asked.recognition)
    decoder = model.speech_decoder

    scores, samples = {}, []
    before = read_scores(*_numbers_of(workdir))
    for name, questions in asked.questions.items():
        score = score_answers(questions, answers[name], asked.left_out[name])
        if score is None:
            continue
        # What the media save of the loss was measured by the run itself.
        gain = before[name].media_gain if name in before else None
        scores[name] = replace(score, media_gain=gain)
        spoken = speak_answers(decoder, name, questions, answers[name], out) if decoder is not None else {}
        samples += _samples(name, questions, answers[name], asked.media, spoken)
    write_samples(out / SAMPLES, samples)
    write_json(out / ABILITIES, {"steps": {step: {name: score.as_json() for name, score in scores.items()}}})
    console.print(ability_table(scores, f"held-out abilities after step {step}"))


def _numbers_of(workdir: epath.Path) -> tuple[Path, list[dict[str, Any]]]:
    """Returns the folder of this machine that has what a run wrote of its scores, and its metrics."""
    home = local_copy(workdir, wanted=is_stage_file) if is_url(workdir) else Path(workdir)
    return home, read_metrics(home / METRICS)


def read_questions(workdir: epath.Path, out: Path, items: int) -> AskedRun:
    """Reads the questions of a run; media that are no files of their own are written below `out`.

    Raises ConfigError: there is no such run, or it has no abilities.
    """
    run = from_dict(RunConfig, read_json_object(workdir / RUN_CONFIG))
    if not run.eval.abilities:
        raise ConfigError(f"{workdir}: the run has no eval.abilities to ask")
    # As many decoding processes as for training would take longer to start than to work.
    run = replace(run, data=replace(run.data, workers=0), eval=replace(run.eval, ability_items=items))
    data, _ = open_run_data(run, resolve_model(run.model), workdir, find_tokenizer(run, workdir))
    questions, left_out, recognition, media = {}, {}, {}, {}
    for name in run.eval.abilities:
        mixture = HeldOutMixture(*data[name], ALL_ROWS, workers=0)
        for source in mixture.sources:
            found, left_out[source] = mixture.questions(source, items)
            if found:
                questions[source], recognition[source] = found, mixture.recognition_prompt
                media |= dict(_media_of(data[name], mixture.sources.index(source), items, out / "media"))
    return AskedRun(run=run, questions=questions, left_out=left_out, recognition=recognition, media=media)


def _media_of(data: MixtureData, source: int, items: int, folder: Path) -> Iterator[tuple[str, AskedMedia]]:
    """Yields for each document of a source its location, and the files of its question."""
    index, config = data.pipeline.indexes[source], data.pipeline.processor.config
    for number in islice(index.numbers(), items):
        document, shown, answered = index.document(number), [], []
        try:
            for element in document_elements(document, config.vision.max_frames):
                answers = getattr(element, "trainable", False)
                # The question ends where the first answer begins, and that one at the next question.
                if answered and not answers:
                    break
                if isinstance(element, ImageElement | VideoElement | AudioElement):
                    path = _file_of(find_media(element.reference, document.media), folder)
                    (answered if answers else shown).append((_KINDS[type(element)], path))
                elif answers:
                    answered.append(("text", ""))
            recording = recording_of([path for kind, path in answered if kind == "audio"], folder)
        except SampleError:
            continue
        yield document.location, AskedMedia(tuple(shown), recording)


def recording_of(paths: Sequence[str], folder: Path) -> str:
    """Returns the path of an answer's recording, "" without one; one in pieces is joined to a file below `folder`."""
    if len(paths) < 2:
        return paths[0] if paths else ""
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(chr(10).join(paths).encode()).hexdigest()[:16]}.wav"
    waves = [read_audio(Media(piece, Path(piece)), _RECORDING_RATE).wave for piece in paths]
    soundfile.write(path, np.concatenate(waves), _RECORDING_RATE)
    return str(path.resolve())


def _file_of(media: Media, folder: Path) -> str:
    """Returns the path of a medium; of one in a built data set, that of a copy below `folder`."""
    path = media.path
    if path is None:
        folder.mkdir(exist_ok=True)
        path = folder / hashlib.sha256(media.data).hexdigest()[:16]
        path.write_bytes(media.data)
    return str(path.resolve())


def speak_answers(
    decoder: SpeechSynthesizer, name: str, questions: Sequence[Question], answers: Sequence[Answer], out: Path
) -> dict[str, str]:
    """Puts the speech of answers into sound, the frames that were scored; returns the files by question's location."""
    files = {}
    for n, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        stream = decoder.stream()
        # Each piece ends a stretch of speech: the next one begins as the first did.
        wave = np.concatenate([*(stream.push(codes, last=True) for codes in answer.speech), stream.close()])
        if len(wave):
            path = out / "speech" / f"{name}_{n:04d}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, wave, decoder.rate)
            files[question.location] = str(path.relative_to(out))
    return files


def _samples(
    name: str,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    media: Mapping[str, AskedMedia],
    spoken: Mapping[str, str],
) -> Iterator[Sample]:
    exact = kind_of(questions) == "exact"
    for question, answer in zip(questions, answers, strict=True):
        if answer.problem:
            continue
        same = exact_match(answer.text, [question.reference])
        files = media.get(question.location, AskedMedia())
        yield Sample(
            ability=name,
            prompt=question.asked,
            reference=question.reference,
            answer=answer.text,
            media=files.shown,
            recording=files.recording,
            # A transcript with one wrong letter is not simply wrong: those without any are told.
            right=bool(same) if exact or same else None,
            speech=spoken.get(question.location, ""),
        )
