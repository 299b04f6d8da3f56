"""What spoken answers sound like: the words that a recognizer hears, DNSMOS, speaker similarity, a MOS of the user's.

DNSMOS (`speechmos`) and speaker embeddings (`resemblyzer`) come with pretrained models in their packages; each measure
is used where its package is installed. A recognizer, and UTMOS, are functions of the user: f(samples, rate).
"""

import hashlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Float32

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.items import Item
from baichuan_omni_jax.evaluation.suites.judges import ContentCache
from baichuan_omni_jax.evaluation.suites.report import Measure, measure
from baichuan_omni_jax.evaluation.suites.scoring import count_errors

DNSMOS_RATE = 16000
AUDIO = (".wav", ".flac", ".mp3", ".ogg")
Recognizer = Callable[[Float32[np.ndarray, " n"], int], str]
Line = Mapping[str, Any]


def recognize_answers(
    folder: Path, lines: Sequence[Line], recognizer: Recognizer, name: str
) -> tuple[dict[int, str], list[str]]:
    """Recognizes what is said in spoken answers, each recording once.

    Args:
        folder: of the file of answers; what was heard is kept in `heard.jsonl` there.
        lines: the answers. One without speech says nothing.
        recognizer: the user's function.
        name: what it is called: another recognizer hears anew.

    Returns:
        What is heard by number of line, without those on which the recognizer failed; sentences about those.
    """
    cache, heard, failed = ContentCache(folder / "heard.jsonl"), dict[int, str](), list[str]()
    for line in lines:
        # No answer is not an answer without speech, which a listener hears as silence.
        if "cause" in line:
            continue
        if "audio" not in line:
            heard[line["line"]] = ""
            continue
        # By content: a recording that was made anew is heard anew.
        path = folder / line["audio"]
        try:
            key = hashlib.sha256(name.encode() + b"\0" + path.read_bytes()).hexdigest()
            if key not in cache:
                text = recognizer(*read_wave(path))
                if not isinstance(text, str):
                    raise TypeError(f"it heard {type(text).__name__}, not text")
                cache.add(key, text, id=line["id"])
        except Exception as error:  # the user's program may raise anything
            failed.append(f"{type(error).__name__}: {error}")
            continue
        heard[line["line"]] = cache[key]
    notes = [f"the recognizer failed on {len(failed)} answers, first with {failed[0]}"] if failed else []
    return heard, notes


def measure_answers(
    folder: Path,
    items: Sequence[tuple[int, Item]],
    lines: Sequence[Line],
    heard: Mapping[int, str] | None,
    voice: Path | None = None,
    mos: Callable[[Float32[np.ndarray, " n"], int], float] | None = None,
) -> tuple[dict[str, Measure], list[str]]:
    """Measures the speech of answers.

    Args:
        folder: of the file of answers.
        items: with their numbers: their language says how errors are counted.
        lines: the answers.
        heard: by number, what a recognizer heard, for errors against what the answer wrote; None: nothing.
        voice: a folder of clips of the voice that is wanted; None: answers are compared with each other.
        mos: a further measure of the user's, as UTMOS.

    Returns:
        The measures by name, and sentences about what was left out.

    Raises:
        ConfigError: a clip of the voice cannot be read.
    """
    spoken = {line["line"]: line for line in lines if "audio" in line}
    measures, notes = dict[str, Measure](), list[str]()
    if not spoken:
        return measures, ["no answer was spoken"]
    # What was written is what was to be said; edits are summed over all answers.
    if heard is not None:
        errors = [
            count_errors(heard[number], spoken[number]["text"], item.language)
            for number, item in items
            if number in heard and number in spoken and spoken[number]["text"].strip()
        ]
        if sum(units for _, units in errors):
            edits, units = zip(*errors, strict=True)
            measures["errors of what is heard against what was written, %"] = measure(edits, units, 100.0)
    # By models that come in packages, each where it is installed.
    waves, failed = list[tuple[np.ndarray, int]](), list[str]()
    for line in spoken.values():
        # A recording that is gone costs itself alone, as in `recognize_answers`.
        try:
            waves.append(read_wave(folder / line["audio"]))
        except (OSError, ValueError, soundfile.SoundFileError) as error:
            failed.append(f"{line['audio']}: {error}")
    if failed:
        notes.append(f"{len(failed)} recordings cannot be read and are left out, first {failed[0]}")
    for name, package, function in (
        ("DNSMOS (1 to 5)", "speechmos", _dnsmos),
        ("speaker similarity (cosine)", "resemblyzer", lambda waves: _similarity(waves, voice)),
    ):
        if find_spec(package) is None:
            notes.append(f"{name} is left out: {package} is not installed (pip install {package})")
        elif values := function(waves):
            measures[name] = measure(values)
    if mos is not None:
        values, failed = list[float](), list[str]()
        for wave in waves:
            try:
                values.append(float(mos(*wave)))
            except Exception as error:  # the user's program may raise anything
                failed.append(f"{type(error).__name__}: {error}")
        if values:
            measures["MOS by the function given"] = measure(values)
        if failed:
            notes.append(f"the MOS function failed on {len(failed)} answers, first with {failed[0]}")
    return measures, notes


def find_clips(voice: Path) -> list[Path]:
    """Lists the clips of a voice. Raises ConfigError where there are none, or one cannot be read."""
    if not voice.is_dir():
        raise ConfigError(f"--voice-clips {voice} is no folder")
    clips = sorted(path for path in voice.iterdir() if path.suffix.lower() in AUDIO)
    if not clips:
        raise ConfigError(f"--voice-clips {voice} holds no {', '.join(AUDIO)}")
    for path in clips:
        try:
            soundfile.info(path)
        except (OSError, soundfile.SoundFileError) as error:
            raise ConfigError(f"--voice-clips {path} cannot be read: {error}") from error
    return clips


def read_wave(path: Path) -> tuple[Float32[np.ndarray, " n"], int]:
    """Reads a recording, its channels averaged: samples of full scale 1, and their rate in Hz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return samples.mean(1), int(rate)


def _dnsmos(waves: Sequence[tuple[np.ndarray, int]]) -> list[float]:
    """The overall quality that DNSMOS gives to each; silent and empty ones are left out."""
    from speechmos import dnsmos

    found = []
    for wave, rate in waves:
        samples = wave if rate == DNSMOS_RATE else soxr.resample(wave, rate, DNSMOS_RATE)
        # It repeats a clip until it is long enough, which an empty one never is, and refuses what is beyond full scale.
        if samples.any():
            # Of one clip it returns a dictionary; its annotations know only of tables.
            scores: Any = dnsmos.run(np.clip(samples, -1, 1).astype(np.float32), sr=DNSMOS_RATE)
            found.append(float(scores["ovrl_mos"]))
    return found


def _similarity(waves: Sequence[tuple[np.ndarray, int]], voice: Path | None) -> list[float]:
    """The cosine of each answer with the centroid of the voice's clips, or of the other answers."""
    # Silence has no voice.
    waves, references = [wave for wave in waves if wave[0].any()], []
    if voice is not None:
        references = [read_wave(path) for path in find_clips(voice)]
    if not waves or len(waves) + len(references) < 2:
        return []
    embedded = _embed([*waves, *references])
    answers = embedded[: len(waves)]
    # One clip of a voice says less than the centroid of several: other voices reach 0.94 of one.
    if references:
        centroids = np.broadcast_to(embedded[len(waves) :].mean(0), answers.shape)
    else:
        centroids = (answers.sum(0) - answers) / (len(answers) - 1)
    cosines = (answers * centroids).sum(1) / np.linalg.norm(answers, axis=1) / np.linalg.norm(centroids, axis=1)
    return cosines.tolist()


def _embed(waves: Sequence[tuple[np.ndarray, int]]) -> Float[np.ndarray, "n d"]:
    # webrtcvad asks setuptools for its own version, which newer setuptools no longer tells.
    if find_spec("pkg_resources") is None:
        stub = types.ModuleType("pkg_resources")
        vars(stub)["get_distribution"] = importlib.metadata.distribution
        sys.modules["pkg_resources"] = stub
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)
    return np.stack([encoder.embed_utterance(preprocess_wav(wave, source_sr=rate)) for wave, rate in waves])
