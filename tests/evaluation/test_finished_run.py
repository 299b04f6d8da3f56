"""Answers of a finished model put into sound: all pieces of one that was spoken, and the recording beside it."""

from dataclasses import dataclass

import numpy as np
import soundfile

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.evaluation.abilities import Answer
from baichuan_omni_jax.evaluation.finished_run import recording_of, speak_answers
from data_pipelines.documents.document import encode_ids
from data_pipelines.documents.questions import Question
from tests.helpers.small_media import write_audio


@dataclass
class Decoder:
    """Sounds of ten samples a frame, of its first code; one that is held back until the end."""

    rate: int = 24000
    vocoder: str = "none"

    def stream(self):
        return Stream()


class Stream:
    def push(self, codes: np.ndarray, last: bool = False) -> np.ndarray:
        assert last, "each piece ends a stretch"
        return np.repeat(codes[:, 0] / 10, 10).astype(np.float32)

    def close(self) -> np.ndarray:
        return np.zeros(0, np.float32)


def asked(location: str) -> Question:
    return Question(location, "tts", "", encode_ids([1], tiny()), "", 0, 1)


def test_all_pieces_of_an_answer_are_one_sound(tmp_path):
    pieces = (np.array([[1, 0], [2, 0]]), np.array([[3, 0]]))
    answers = [Answer("a b", 3, speech=tuple(piece.astype(np.int32) for piece in pieces)), Answer()]
    files = speak_answers(Decoder(), "speak", [asked("m:1"), asked("m:2")], answers, tmp_path)
    assert files == {"m:1": "speech/speak_0000.wav"}, "silence has no file"
    wave, rate = soundfile.read(tmp_path / files["m:1"])
    assert (len(wave), rate) == (30, 24000)
    assert np.allclose(wave[::10], [0.1, 0.2, 0.3], atol=1e-4)


def test_a_recording_in_pieces_is_joined(tmp_path):
    one, two = write_audio(tmp_path / "one.wav", 0.5), write_audio(tmp_path / "two.wav", 0.25)
    assert recording_of([], tmp_path / "media") == ""
    assert recording_of([str(one)], tmp_path / "media") == str(one)
    joined = soundfile.info(recording_of([str(one), str(two)], tmp_path / "media"))
    assert abs(joined.duration - 0.75) < 0.01
