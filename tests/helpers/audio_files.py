"""Small audio files of several formats, how long they are said to be, why they are refused."""

import io
from pathlib import Path

import pytest
import soundfile

from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio, probe_audio, read_audio
from data_pipelines.media.location import Media
from tests.helpers.small_media import tone, write_track

RATE = 16000


CLOSE = 0.020  # seconds


def memory(data: bytes, name: str = "a") -> Media:
    return Media(name, None, bytes(data))


def length(found: Media, rate: int = RATE) -> int:
    """Samples measured, which must be those decoded."""
    samples = probe_audio(found, rate)
    assert len(read_audio(found, rate).wave) == samples
    assert len(decode_audio(found, samples, rate)) == samples
    return samples


def refusal(found: Media) -> str:
    with pytest.raises(SampleError) as caught:
        decode_audio(found, probe_audio(found, RATE), RATE)
    assert caught.value.cause == "unreadable_media"
    return str(caught.value)


def wav(seconds: float = 3.0, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(seconds), RATE, format=form, subtype=subtype)
    return file.getvalue()


def mp3(folder: Path, seconds: float, loud: float = 1.0, xing: str = "1") -> bytes:
    path = folder / "song.mp3"
    options = {"bit_rate": 48000, "write_xing": xing}  # frames of 216 bytes
    return write_track(path, loud * tone(seconds), "libmp3lame", RATE, "mp3", **options).read_bytes()
