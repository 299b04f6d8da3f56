"""The media of a data set while it is planned: what has to be made, under which path; and the making itself.

Planning only draws random numbers and names files, so the manifests depend on the seed alone; `produce` does the work.
"""

import random
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_pipelines.sample.photographs import (
    PHOTOGRAPHS,
    SIZE,
    Crop,
    box_around,
    overlap,
    random_crop,
    render,
    save,
    visible_parts,
)
from data_pipelines.synthesis.speech.espeak import SAMPLE_RATE, speak

FRAME_RATE = 8
SECONDS = (2.0, 6.0)
MOVES = ("right", "left", "up", "down", "in", "out", "cut")
_SIZES = ((160, 120), (192, 144), (224, 160), (160, 160), (144, 192))


@dataclass(frozen=True)
class VideoPlan:
    """A camera move from the crop `first` to the crop `last`; a `cut` shows the one, then the other."""

    move: str
    first: Crop
    last: Crop


def random_video(rng: random.Random, move: str) -> VideoPlan:
    """Draws a video with this move whose two ends show something that can be named."""
    # Drawn until both ends show something that a caption can name.
    while True:
        size = rng.choice(_SIZES)
        photo = rng.choice(["china", "flower"])
        if move == "cut":
            other = "flower" if photo == "china" else "china"
            video = VideoPlan(move, _end(rng, photo, size), _end(rng, other, size))
        elif move in ("in", "out"):
            near = _end(rng, photo, size, heights=(110, 170))
            center = ((near.box[0] + near.box[2]) / 2, (near.box[1] + near.box[3]) / 2)
            far = _crop(photo, size, center, rng.uniform(300, 400))
            video = VideoPlan(move, far, near) if move == "in" else VideoPlan(move, near, far)
        else:
            video = _pan(rng, move, photo, size)
        if visible_parts(video.first) and visible_parts(video.last):
            return video


def _crop(photo: str, size: tuple[int, int], center: tuple[float, float], height: float) -> Crop:
    height = min(height, SIZE[1], SIZE[0] * size[1] / size[0])
    return Crop(photo, box_around(photo, center, height * size[0] / size[1], height), size)


def _end(rng: random.Random, photo: str, size: tuple[int, int], heights=(160, 300)) -> Crop:
    center = (rng.uniform(0.2, 0.8) * SIZE[0], rng.uniform(0.2, 0.8) * SIZE[1])
    return _crop(photo, size, center, rng.uniform(*heights))


def _pan(rng: random.Random, move: str, photo: str, size: tuple[int, int]) -> VideoPlan:
    # The camera goes from edge to edge along one axis and stays where it is on the other.
    horizontal = move in ("left", "right")
    height = rng.uniform(150, 260) if horizontal else rng.uniform(130, 190)
    across = rng.uniform(0.3, 0.7)
    ends = []
    for along in (0.0, 1.0) if move in ("right", "down") else (1.0, 0.0):
        x, y = (along, across) if horizontal else (across, along)
        ends.append(_crop(photo, size, (x * SIZE[0], y * SIZE[1]), height))
    return VideoPlan(move, *ends)


def view(video: VideoPlan, ratio: float) -> Crop:
    """Returns what the camera sees when `ratio` (0-1) of the video has passed."""
    if video.move == "cut":
        return video.first if ratio < 0.5 else video.last
    sides = zip(video.first.box, video.last.box, strict=True)
    left, top, right, bottom = (round((1 - ratio) * a + ratio * b) for a, b in sides)
    return Crop(video.first.photo, (left, top, right, bottom), video.first.size)


def frames(video: VideoPlan, count: int) -> list[np.ndarray]:
    """Renders `count` RGB frames, uint8 (height, width, 3)."""
    return [np.asarray(render(view(video, index / max(count - 1, 1)))) for index in range(count)]


def video_seconds(samples: np.ndarray, sample_rate: int) -> float:
    """Returns how long the video of a spoken track lasts: the track, within `SECONDS`, rounded up to whole half
    seconds.
    """
    return float(np.clip(np.ceil(2 * len(samples) / sample_rate) / 2, *SECONDS))


def write_video(video: VideoPlan, samples: np.ndarray, sample_rate: int, path: Path) -> None:
    """Encodes a video with its spoken track.

    Args:
        video: the camera's move.
        samples: mono int16 (t,), the track; cut where it is longer than the longest video.
        sample_rate: of the track in Hz.
        path: the MP4 file to write.
    """
    # The video lasts as long as its track: padded with silence, or cut.
    seconds = video_seconds(samples, sample_rate)
    track = np.zeros(round(seconds * sample_rate), np.int16)
    track[: len(samples)] = samples[: len(track)]
    encode_video(frames(video, round(seconds * FRAME_RATE)), FRAME_RATE, path, track, sample_rate)


def encode_video(
    images: Sequence[np.ndarray], frame_rate: int, path: Path, track: np.ndarray | None = None, sample_rate: int = 0
) -> None:
    """Encodes frames as MP4.

    Args:
        images: RGB frames, uint8 (height, width, 3); sides are even.
        frame_rate: frames a second.
        path: the file to write.
        track: mono int16 (t,), the sound; None: a silent video, without a track.
        sample_rate: of the track in Hz.
    """
    with av.open(str(path), "w", format="mp4") as container:
        height, width = images[0].shape[:2]
        stream = _add_video_stream(container, (width, height), frame_rate)
        audio = None if track is None else _add_audio_stream(container, sample_rate)
        # Images, then audio: the container interleaves by time.
        for index, pixels in enumerate(images):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, frame_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None and track is not None:
            frame = av.AudioFrame.from_ndarray(track[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))


def _add_video_stream(container, size: tuple[int, int], frame_rate: int):
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # One thread, and no macroblock tree, whose results vary from run to run: the same video gives the same bytes.
    h264 = {"crf": "24", "preset": "veryfast", "mbtree": "0"} if codec == "libx264" else {}
    options = {"threads": "1"} | h264
    stream = container.add_stream(codec, rate=frame_rate, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    return stream


def _add_audio_stream(container, sample_rate: int):
    stream = container.add_stream("aac", rate=sample_rate)
    stream.codec_context.layout = "mono"
    stream.bit_rate = 48000
    return stream


FOLDERS = ("images", "speech", "video")
VOICES = {
    "en": ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us+f1", "en-us+m3", "en+f4"),
    "zh": ("cmn", "cmn+f1", "cmn+m3", "cmn+f4"),
}
"""eSpeak voices by language. `cmn` is Mandarin; `+f1`, `+m3` are female and male variants of a voice."""
HELD_OUT_VOICES = {"en": ("en-us+f2", "en-gb-x-gbclan+m1", "en+m7"), "zh": ("cmn+f2", "cmn+m1", "cmn+m7")}
"""Those that no training document is spoken by."""
MOST_SHARED = 0.8  # of a held-out crop and one of training, at most (`photographs.overlap`)


@dataclass(frozen=True)
class Utterance:
    """Words to be spoken by one voice."""

    text: str
    voice: str
    rate: int
    pitch: int


@dataclass(frozen=True)
class VideoFile:
    """A video and the words of its audio track."""

    path: str
    video: VideoPlan
    language: str
    track: Utterance


@dataclass
class MediaPlan:
    """Names media files and remembers how each is to be made: `images`, `speech` and `videos`, by relative path.

    Those of `held_out` documents have voices and names of their own; in training no crop is nearly one of `reserved`.
    """

    held_out: bool = False
    reserved: Sequence[Crop] = ()
    images: dict[str, Crop] = field(default_factory=dict)
    speech: dict[str, Utterance] = field(default_factory=dict)
    videos: list[VideoFile] = field(default_factory=list)

    def add_image(self, rng: random.Random) -> tuple[str, Crop]:
        """Adds a new image; returns its path and what it is a crop of."""
        while True:
            crop = random_crop(rng, rng.choice(PHOTOGRAPHS))
            if all(overlap(crop, other) <= MOST_SHARED for other in self.reserved):
                break
        # Both formats, as in real data: PNG keeps pixels, JPEG is what photographs come in.
        suffix = "png" if rng.random() < 0.3 else "jpg"
        path = f"images/{self._prefix}{crop.photo}_{len(self.images):04d}.{suffix}"
        self.images[path] = crop
        return path, crop

    def add_speech(self, rng: random.Random, text: str, language: str) -> str:
        """Adds a new clip of speech; returns its path."""
        utterance = self._utterance(rng, text, language, (160, 190))
        path = f"speech/{self._prefix}{language}_{len(self.speech):04d}.wav"
        self.speech[path] = utterance
        return path

    def add_videos(self, rng: random.Random, count: int, describe: Callable[[VideoPlan, str], str]) -> None:
        """Adds `count` videos, every camera move about equally often; `describe` writes what the track of one says."""
        for index in range(count):
            video, language = random_video(rng, MOVES[index % len(MOVES)]), rng.choice(("en", "zh"))
            # A little faster than other speech: the whole sentence should fit the longest video.
            track = self._utterance(rng, describe(video, language), language, (175, 195))
            path = f"video/{self._prefix}{video.move}_{index:03d}.mp4"
            self.videos.append(VideoFile(path, video, language, track))

    def join(self, other: "MediaPlan") -> "MediaPlan":
        """Returns the plan of the media of both."""
        images, speech = self.images | other.images, self.speech | other.speech
        return MediaPlan(images=images, speech=speech, videos=self.videos + other.videos)

    @property
    def _prefix(self) -> str:
        return "held_out_" if self.held_out else ""

    def _utterance(self, rng: random.Random, text: str, language: str, rates: tuple[int, int]) -> Utterance:
        voices = (HELD_OUT_VOICES if self.held_out else VOICES)[language]
        return Utterance(text, rng.choice(voices), rng.randint(*rates), rng.randint(35, 65))


def record(plan: MediaPlan) -> dict[str, np.ndarray]:
    """Speaks all that is planned; returns the samples (int16, `SAMPLE_RATE` Hz) by the path they belong to."""
    # One after the other: eSpeak is one process, and the order does not change what it says.
    spoken = {clip.path: clip.track for clip in plan.videos} | plan.speech
    recordings = {}
    for path, utterance in spoken.items():
        samples = speak(utterance.text, utterance.voice, rate=utterance.rate, pitch=utterance.pitch)
        # What is shorter than a second ends in silence.
        recordings[path] = np.pad(samples, (0, max(0, SAMPLE_RATE - len(samples))))
    return recordings


def produce(plan: MediaPlan, recordings: dict[str, np.ndarray], path: str, root: Path) -> None:
    """Writes one planned file.

    Args:
        plan: says what the file is.
        recordings: the speech of all files, by path (`record`).
        path: the file's, relative to `root`.
        root: the data set's folder.
    """
    if path in plan.images:
        save(plan.images[path], root / path)
    elif path in plan.speech:
        with wave.open(str(root / path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes(recordings[path].astype("<i2").tobytes())
    else:
        video = next(clip.video for clip in plan.videos if clip.path == path)
        write_video(video, recordings[path], SAMPLE_RATE, root / path)
