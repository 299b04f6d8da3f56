"""Questions with their answers, to look at and to listen to: WORKDIR/evaluation/samples.jsonl, a line each.

    {"ability": "color", "prompt": "What color is it?", "media": [{"type": "image", "path": "/data/images/7.png"}],
     "reference": "red", "answer": "red", "right": true, "recording": "", "speech": ""}

Paths are absolute, or relative to the file's folder. Where an answer is to be spoken, `recording` is the right one,
`speech` the model's, and `answer` what the model itself hears in it. `right` is None of what is neither right nor wrong
as a whole, as a transcript with one wrong letter.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baichuan_omni_jax.storage import atomic_write

SAMPLES = "samples.jsonl"
KINDS = ("image", "video", "audio")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question and its answer. `media` are (kind, path) in the order in which the question has them."""

    ability: str
    prompt: str
    reference: str
    answer: str
    media: tuple[tuple[str, str], ...] = ()
    right: bool | None = None
    recording: str = ""
    speech: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the fields of its line."""
        return asdict(self) | {"media": [{"type": kind, "path": path} for kind, path in self.media]}


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes the file, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(sample.as_json(), ensure_ascii=False) + "\n" for sample in samples)


def read_samples(path: Path) -> list[Sample]:
    """Reads the samples of a file; lines that are none are passed over, and a missing file has none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    return [sample for line in lines if (sample := _sample(line, path.parent)) is not None]


def _sample(line: bytes, folder: Path) -> Sample | None:
    try:
        found = json.loads(line.decode("utf-8-sig"))
        media = tuple((entry["type"], str(folder / entry["path"])) for entry in found.get("media") or ())
        texts = {name: _whole(str(found[name])) for name in ("ability", "prompt", "reference", "answer")}
        sounds = {name: str(folder / path) for name in ("recording", "speech") if (path := found.get(name))}
        right = found.get("right")
        return Sample(
            **texts,
            media=tuple(each for each in media if each[0] in KINDS),
            right=right if isinstance(right, bool) else None,
            **sounds,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _whole(text: str) -> str:
    """The text with question marks for half characters, which JSON may hold and no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
