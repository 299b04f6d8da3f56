"""The media of one document as its sequence needs them: sizes from headers, pixels and samples where they are decoded.

One look at a file gives both: whatever decides the sequence comes from the header, and what is asked for is decoded
while the file is open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt8

from baichuan_omni_jax.config import ImagesConfig
from baichuan_omni_jax.config.architecture import AudioConfig, VisionConfig
from data_pipelines.documents.prompts import ImageElement, VideoElement
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import clip_key, probe_audio, read_audio
from data_pipelines.media.containers import Damage
from data_pipelines.media.features import Window, clip_windows, log_mel, patchify, resize_image, visual_size
from data_pipelines.media.images import load_image, probe_image
from data_pipelines.media.location import Media
from data_pipelines.media.videos import probe_video, read_video


@runtime_checkable
class Codes(Protocol):
    """The store of audio codes. `lookup` of a key that is not there raises KeyError."""

    def lookup(self, key: tuple[str, int]) -> Integer[np.ndarray, "n q"]:
        """Returns the code frames of the window with this `clip_key`."""
        ...


@dataclass(frozen=True)
class AudioItem:
    """One window of a clip that a document refers to; `samples` is the whole clip's length at the model's rate."""

    media: Media
    samples: int
    window: Window

    @property
    def key(self) -> tuple[str, int]:
        """Its key in the store of codes; reads the file."""
        return clip_key(self.media, self.window.index)


@dataclass(frozen=True)
class PrecomputedAudio:
    """Audio of a prompt that is known as `codes` (n, levels) already, heard or `spoken`."""

    codes: Int32[np.ndarray, "n q"]
    spoken: bool = True


@dataclass(frozen=True)
class ImageGroup:
    """Images of one size: a still, a listed frame, or the `count` frames of a video file.

    `patches` are those of one image. `decoded` holds the patches of each, with their grid, where they were asked for;
    `damaged` counts the packets of the video that could not be decoded then.
    """

    patches: int
    count: int
    frame: bool
    decoded: tuple[tuple[UInt8[np.ndarray, "p v"], Int32[np.ndarray, "p 2"]], ...] = ()
    damaged: int = 0


@dataclass(frozen=True)
class AudioClip:
    """A clip of audio in windows; `mels` (frames, mels) and `waves` (samples by rate) of each where asked for.

    `codes` are its code frames where a prompt brings them: there is no media then, and one window. `damaged` counts
    the packets that could not be decoded.
    """

    media: Media
    samples: int
    windows: list[Window]
    mels: tuple[Float32[np.ndarray, "_ mels"], ...] = ()
    waves: tuple[Mapping[int, Float32[np.ndarray, "_"]], ...] = ()
    codes: Int32[np.ndarray, "n q"] | None = None
    damaged: int = 0

    @property
    def code_frames(self) -> int:
        """How many code frames all windows give."""
        return sum(window.code_frames for window in self.windows)

    @classmethod
    def from_codes(cls, codes: Int32[np.ndarray, "n q"]) -> "AudioClip":
        """Makes a clip of what is known as codes alone."""
        return cls(Media("speech", None), 0, [Window(0, 0, 0, 0, len(codes))], codes=codes)


def read_images(
    element: ImageElement | VideoElement,
    media: Media,
    vision: VisionConfig,
    settings: ImagesConfig,
    max_frames: int,
    decode: bool,
) -> ImageGroup:
    """Reads the size of a still or the frames of a video, and their pixels.

    Args:
        element: what the document says of it: a still, a listed frame, a video file.
        media: its bytes.
        vision: patch size, limits of area, frames a second.
        settings: how stills are taken.
        max_frames: most frames of a video (0: the model's own limit).
        decode: whether patches are wanted, too.

    Returns:
        The images, all of one size.

    Raises:
        SampleError: "unreadable_media", "too_big_media".
    """
    damage, images = Damage(), []
    # Stage 1: sizes, from the header or with the same look at the file that decodes.
    if isinstance(element, VideoElement):
        most = min(max_frames or vision.max_frames, vision.max_frames)
        if decode:
            probe, images = read_video(media, vision.frames_per_second, most, damage)
        else:
            probe = probe_video(media, vision.frames_per_second, most)
        height, width, count, frame = probe.height, probe.width, len(probe.times), True
    elif decode:
        images = [load_image(media, settings)]
        height, width, count, frame = images[0].height, images[0].width, 1, element.frame
    else:
        (height, width), count, frame = probe_image(media, settings), 1, element.frame
    # Stage 2: the size that the model sees; of a video all frames have one.
    height, width = visual_size(height, width, vision, frame=frame)
    size = vision.patch_size
    # Resized one by one: a video's frames come from a generator, and are never all held as pixels.
    decoded = tuple(patchify(resize_image(image, height, width), size, vision.spatial_merge_size) for image in images)
    return ImageGroup((height // size) * (width // size), count, frame, decoded, damage.damaged)


def read_clip(media: Media, audio: AudioConfig, decode: bool, rates: Sequence[int] = ()) -> AudioClip:
    """Reads the windows of a clip and, where asked, decodes them.

    Args:
        media: the file's bytes.
        audio: sampling rate, mel and window rule of the model.
        decode: whether log mels are wanted, too.
        rates: at which rates in Hz samples are wanted besides.

    Returns:
        The clip: windows from the header, `mels` (frames, mels) and `waves` of each where asked.

    Raises:
        SampleError: "unreadable_media" for what cannot be read or gives no code frame, "too_big_media", "silent_audio"
            (decoded only).
    """
    rate = audio.sampling_rate
    # Header and decoder agree on the length by construction (`media.audio`), so the file is decoded once at most.
    heard = read_audio(media, rate) if decode else None
    samples = len(heard.wave) if heard else probe_audio(media, rate)
    windows = clip_windows(samples, audio)
    if not windows:
        raise SampleError("unreadable_media", f"{media.name} is too short: {samples} samples give no code frame")
    mels, waves = (), ()
    if heard:
        mels = tuple(log_mel(heard.wave[window.start : window.start + window.samples], audio).T for window in windows)
    # Vocoder and flow targets are made of samples at their own rates, not of the model's resampled ones.
    if rates:
        whole = {rate: read_audio(media, rate).wave for rate in rates}
        waves = tuple(_cut_window(whole, window, rate) for window in windows)
    return AudioClip(media, samples, windows, mels, waves, damaged=heard.damaged if heard else 0)


def _cut_window(waves: Mapping[int, np.ndarray], window: Window, rate: int) -> dict[int, np.ndarray]:
    """Returns a window, counted in samples of `rate`, of one clip at several rates."""
    start, stop = window.start, window.start + window.samples
    return {other: wave[start * other // rate : stop * other // rate] for other, wave in waves.items()}


def find_codes(clip: AudioClip, window: Window, store: Codes | None, audio: AudioConfig) -> Int32[np.ndarray, "n q"]:
    """Finds the code frames of a window: a prompt's own, the store's, or zeros where there is no store.

    Args:
        clip: the clip that the window is of.
        window: which stretch of it.
        store: the audio codes of the training data; None: a tokenizer that runs on the mels will fill them in.
        audio: the model's codebooks.

    Returns:
        (n, levels) codes.

    Raises:
        SampleError: "no_codes" for a window that the store lacks; "changed" for codes that are not of the measured
            length, or exceed the model's codebooks.
    """
    # A prompt brings its own codes: they are checked where the prompt is read.
    if clip.codes is not None:
        return clip.codes
    # Of the right length, so that rows are laid out as they will be with codes.
    if store is None:
        return np.zeros((window.code_frames, audio.levels), np.int32)
    name, sizes = clip.media.name, audio.codebook_sizes
    try:
        found = np.asarray(store.lookup(clip_key(clip.media, window.index)))
    except KeyError as error:
        raise SampleError("no_codes", f"{name}: window {window.index} has no codes") from error
    # A store of another window rule or tokenizer would shift everything behind it in the row.
    expected = window.code_frames, len(sizes)
    if found.shape != expected:
        message = f"{name}: codes of window {window.index} have shape {found.shape}, not {expected}"
        raise SampleError("changed", message)
    if ((found < 0) | (found >= np.asarray(sizes))).any():
        raise SampleError("changed", f"{name}: codes of window {window.index} exceed the codebooks")
    return found.astype(np.int32)


def join_patches(
    groups: Sequence[ImageGroup], patch_values: int
) -> tuple[UInt8[np.ndarray, "p v"], Int32[np.ndarray, "p 2"], Int32[np.ndarray, "p"]]:
    """Returns the decoded patches of a document, their grid, and the number of each one's image, from 1."""
    decoded = [each for group in groups for each in group.decoded]
    patches = [np.zeros((0, patch_values), np.uint8), *(values for values, _ in decoded)]
    grids = [np.zeros((0, 2), np.int32), *(grid for _, grid in decoded)]
    # Numbered from 1: patches of padding have image 0.
    numbers = np.repeat(np.arange(len(grids), dtype=np.int32), [len(grid) for grid in grids])
    return np.concatenate(patches), np.concatenate(grids), numbers
