"""How well speech can be understood after something was done to it: STOI, PESQ, and what a recogniser makes of it.

STOI and PESQ come from kept libraries (`pystoi`, `pesq`; the extra `evaluate`), each used where it is installed.
"""

import importlib.util
import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from data_pipelines.errors import SampleError
from data_pipelines.synthesis.filters.rules import count_edits, speech_units
from data_pipelines.text.languages import language_of

RATE = 16000  # Hz, of both measures
LIBRARIES = {"stoi": "pystoi", "pesq": "pesq"}

Wave = Float32[np.ndarray, "_"]
Recogniser = Callable[[np.ndarray, int], str]


def missing_measures() -> list[str]:
    """A sentence for each measure whose library is not installed."""
    return [
        f"{measure} is left out: {package} is not installed (pip install '.[evaluate]', or pip install {package})"
        for measure, package in LIBRARIES.items()
        if importlib.util.find_spec(package) is None
    ]


def measure(original: Wave, again: Wave) -> dict[str, float]:
    """`stoi` (about 0 to 1) and `pesq` (wide band, 1 to 4.6) of speech at `RATE` Hz against what it was.

    The longer one is cut. A measure whose library is missing, or that finds too little speech, is left out.
    """
    length = min(len(original), len(again))
    pair = original[:length], again[:length]
    if not pair[0].any():
        return {}
    found = {}
    for name, function in (("stoi", _stoi), ("pesq", _pesq)):
        value = function(*pair) if importlib.util.find_spec(LIBRARIES[name]) else None
        if value is not None:
            found[name] = float(value)
    return found


def _stoi(original: Wave, again: Wave) -> float | None:
    from pystoi import stoi

    with warnings.catch_warnings():
        # It warns, and returns 1e-5, where 0.4 s are not left when silence is cut out.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            value = stoi(original, again, RATE)
        except (RuntimeWarning, ValueError):
            return None
    return value if np.isfinite(value) else None


def _pesq(original: Wave, again: Wave) -> float | None:
    from pesq import PesqError, pesq

    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = pesq(RATE, original, again, "wb")
    except (PesqError, ValueError):
        return None
    return value if np.isfinite(value) else None


class Recognition:
    """Counts a recogniser's errors over many clips: words in English, characters in Chinese; and characters in both.

    `recogniser(samples, rate) -> text` is the user's own.
    """

    def __init__(self, recogniser: Recogniser) -> None:
        self._recogniser = recogniser
        self._counts = dict.fromkeys(("word_edits", "words", "character_edits", "characters"), 0)

    def hear(self, samples: Wave, rate: int) -> str:
        """Raises SampleError "recogniser_failed" where the hook raises, or returns anything but text."""
        try:
            heard = self._recogniser(samples, rate)
        except Exception as error:  # the user's program may raise anything
            raise SampleError("recogniser_failed", str(error) or type(error).__name__) from error
        if not isinstance(heard, str):
            raise SampleError("recogniser_failed", f"it heard {type(heard).__name__}, not text")
        return heard

    def count(self, heard: str, said: str) -> None:
        """Adds the errors of one clip."""
        language = language_of(said) or "en"
        for unit, of in (("word", language), ("character", "zh")):
            truth = speech_units(said, of)
            self._counts[f"{unit}_edits"] += count_edits(truth, speech_units(heard, of))
            self._counts[f"{unit}s"] += len(truth)

    def rates(self) -> dict[str, float]:
        """`wer` and `cer`, edits over units; nothing where nothing was said."""
        counts = self._counts
        if not counts["words"]:
            return {}
        return {"wer": counts["word_edits"] / counts["words"], "cer": counts["character_edits"] / counts["characters"]}
