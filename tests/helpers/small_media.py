"""Small media files and documents for the tests of this folder."""

import base64
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

from data_pipelines.documents.document import Document
from data_pipelines.media.location import Media


def media(path: Path) -> Media:
    return Media(path.name, path)


def document(text: str, root: Path) -> Document:
    return Document(id="d", type="", text=text, location="m.jsonl:1", media=root)


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path: Path, height: int, width: int, **options) -> Path:
    Image.fromarray(noise_image(height, width)).save(path, **options)
    return path


def tone(seconds: float, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_audio(path: Path, seconds: float, rate: int = 16000, **options) -> Path:
    soundfile.write(path, tone(seconds, rate), rate, **options)
    return path


def write_video(
    path: Path,
    seconds: float,
    height: int = 64,
    width: int = 96,
    audio: float = 0,
    header_first: bool = False,
    changing: bool = False,
    codec: str = "",
    volume: float = 1.0,
    **options: str,
) -> Path:
    """5 frames a second, grey of level 20 + 10 * the second they are in; an audio track of `audio` seconds if any.

    With `changing` each frame is another image; `volume` 0 makes the audio silent. `options` are the container's.
    """
    rate, webm = 5, path.suffix == ".webm"
    options |= {"movflags": "faststart"} if header_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec or ("libvpx" if webm else "mpeg4"), rate=rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        track = container.add_stream("libopus" if webm else "aac", rate=48000) if audio else None
        for i in range(round(seconds * rate)):
            pixels = np.full((height, width, 3), 20 + (i if changing else 10 * (i // rate)) % 200, np.uint8)
            if changing:
                pixels[i % height, :, 0] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
        if track:
            _write_track(container, track, volume * tone(audio, 48000))
    return path


def _write_track(container, track, wave: np.ndarray) -> None:
    for start in range(0, len(wave), 960):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 960], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, start
        container.mux(track.encode(frame))
    container.mux(track.encode(None))


def as_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def write_track(
    path: Path,
    wave: np.ndarray,
    codec: str,
    rate: int,
    form: str,
    start: int = 0,
    bit_rate: int = 0,
    **options: str,
) -> Path:
    """One mono track of `wave`, its clock beginning at sample `start`.

    `bit_rate` is in bits a second (0: the codec's own), `options` are those of the container.
    """
    with av.open(str(path), "w", format=form, options=options) as container:
        track = container.add_stream(codec, rate=rate, layout="mono")
        if bit_rate:
            track.bit_rate = bit_rate
        step = track.codec_context.frame_size or 1024
        for place in range(0, len(wave), step):
            frame = av.AudioFrame.from_ndarray(wave[None, place : place + step], format="flt", layout="mono")
            frame.sample_rate, frame.pts = rate, start + place
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    return path
