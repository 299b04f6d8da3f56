"""The media of a data set while it is planned: what has to be made, under which path; and the making itself.

Planning only draws random numbers and names files, so the manifests depend on the seed alone; `produce` does the work.
"""

import random
import wave
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.sample.photographs import PHOTOGRAPHS, Crop, random_crop, save
from data_pipelines.sample.scenes import video_caption_text
from data_pipelines.sample.video import MOVES, VideoPlan, random_video, write_video
from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE, speak

FOLDERS = ("images", "speech", "video")
VOICES = {
    "en": ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us+f1", "en-us+m3", "en+f4"),
    "zh": ("cmn", "cmn+f1", "cmn+m3", "cmn+f4"),
}
"""eSpeak voices by language. `cmn` is Mandarin; `+f1`, `+m3` are female and male variants of a voice."""


@dataclass(frozen=True)
class Utterance:
    """Words to be spoken by one voice."""

    text: str
    voice: str
    rate: int
    pitch: int


@dataclass(frozen=True)
class VideoFile:
    """A video and the words of its sound track."""

    path: str
    video: VideoPlan
    language: str
    track: Utterance


@dataclass
class MediaPlan:
    """Names media files and remembers how each is to be made: `images`, `speech` and `videos`, by relative path."""

    images: dict[str, Crop] = field(default_factory=dict)
    speech: dict[str, Utterance] = field(default_factory=dict)
    videos: list[VideoFile] = field(default_factory=list)

    def add_image(self, rng: random.Random) -> tuple[str, Crop]:
        """A new picture; returns its path and what it is a crop of."""
        crop = random_crop(rng, rng.choice(PHOTOGRAPHS))
        suffix = "png" if rng.random() < 0.3 else "jpg"
        path = f"images/{crop.photo}_{len(self.images):04d}.{suffix}"
        self.images[path] = crop
        return path, crop

    def add_speech(self, rng: random.Random, text: str, language: str) -> str:
        """A new clip of speech; returns its path."""
        utterance = _utterance(rng, text, language, (160, 190))
        path = f"speech/{language}_{len(self.speech):04d}.wav"
        self.speech[path] = utterance
        return path

    def add_videos(self, rng: random.Random, count: int) -> None:
        """Adds `count` videos, every camera move about equally often."""
        for index in range(count):
            video, language = random_video(rng, MOVES[index % len(MOVES)]), rng.choice(("en", "zh"))
            # A little faster than other speech: the whole sentence should fit the longest video.
            track = _utterance(rng, video_caption_text(video, language), language, (175, 195))
            self.videos.append(VideoFile(f"video/{video.move}_{index:03d}.mp4", video, language, track))


def _utterance(rng: random.Random, text: str, language: str, rates: tuple[int, int]) -> Utterance:
    return Utterance(text, rng.choice(VOICES[language]), rng.randint(*rates), rng.randint(35, 65))


def record(plan: MediaPlan) -> dict[str, np.ndarray]:
    """Speaks all that is planned; returns the samples (int16, `SAMPLE_RATE` Hz) by the path they belong to."""
    spoken = {clip.path: clip.track for clip in plan.videos} | plan.speech
    return {path: _speak(utterance) for path, utterance in spoken.items()}


def produce(plan: MediaPlan, recordings: dict[str, np.ndarray], path: str, root: Path) -> None:
    """Writes one planned file under `root`."""
    if path in plan.images:
        save(plan.images[path], root / path)
    elif path in plan.speech:
        _write_wave(recordings[path], root / path)
    else:
        video = next(clip.video for clip in plan.videos if clip.path == path)
        write_video(video, recordings[path], SAMPLE_RATE, root / path)


def _speak(utterance: Utterance) -> np.ndarray:
    """A clip shorter than a second ends in silence."""
    samples = speak(utterance.text, utterance.voice, rate=utterance.rate, pitch=utterance.pitch)
    return np.pad(samples, (0, max(0, SAMPLE_RATE - len(samples))))


def _write_wave(samples: np.ndarray, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
