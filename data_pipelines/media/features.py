"""Features that the model is given of media: patches, Whisper mels of 30 s windows; mels that decoders learn."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, sqrt

import numpy as np
from jaxtyping import Float32, Int32, UInt8
from PIL import Image
from scipy.sparse import csr_array

from baichuan_omni_jax.config.architecture import AudioConfig, PixelLimits, VisionConfig
from baichuan_omni_jax.config.mel_targets import HIGHEST, MelTargetSpec
from data_pipelines.errors import SampleError
from data_pipelines.media.images import MAX_ASPECT


def smart_resize(height: int, width: int, limits: PixelLimits, factor: int = 28) -> tuple[int, int]:
    """Chooses (height, width) that the model sees: multiples of `factor`, area within `limits`, aspect nearly kept.

    Args:
        height: of the file, in pixels.
        width: of the file, in pixels.
        limits: least and largest area, in pixels.
        factor: pixels of a visual token's side: patch size x merge size.

    Returns:
        (height, width), as the released processor does (Python's round).

    Raises:
        SampleError: "unreadable_media" when one side is more than 200 times the other.

    >>> smart_resize(200, 133, PixelLimits(min_pixels=3136, max_pixels=12544))
    (112, 84)
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise SampleError("unreadable_media", f"aspect ratio of {height}x{width} exceeds {MAX_ASPECT}")
    # Python's round: halves go to the even multiple, as in the released processor.
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > limits.max_pixels:
        shrink = sqrt(height * width / limits.max_pixels)
        # With small limits the released form floors a very narrow side to nothing: keep one factor of it, and of the
        # other side what the area allows.
        longest = limits.max_pixels // factor**2 * factor
        new_height = min(longest, max(factor, floor(height / shrink / factor) * factor))
        new_width = min(longest, max(factor, floor(width / shrink / factor) * factor))
    elif new_height * new_width < limits.min_pixels:
        grow = sqrt(limits.min_pixels / (height * width))
        new_height = ceil(height * grow / factor) * factor
        new_width = ceil(width * grow / factor) * factor
    return new_height, new_width


def visual_size(height: int, width: int, config: VisionConfig, frame: bool) -> tuple[int, int]:
    """Applies `smart_resize` with the limits of a still or of a frame.

    Args:
        height: of the file, in pixels.
        width: of the file, in pixels.
        config: limits, patch size, merge size.
        frame: whether it is a frame of a video.

    Returns:
        (height, width), multiples of patch size x merge size.
    """
    limits = config.frame_limits if frame else config.image_limits
    return smart_resize(height, width, limits, config.patch_size * config.spatial_merge_size)


def resize_image(
    image: UInt8[np.ndarray, "h w 3"] | Image.Image, height: int, width: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Resizes uint8 RGB, bicubic (Pillow)."""
    opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return np.asarray(opened.resize((width, height), Image.Resampling.BICUBIC))


def patchify(
    image: UInt8[np.ndarray, "H W 3"], patch: int = 14, merge: int = 2
) -> tuple[UInt8[np.ndarray, "p v"], Int32[np.ndarray, "p 2"]]:
    """Cuts an image into patches flattened as (channel, row, column), v = 3 x 14 x 14, and their (row, column) in the
    grid.

    The four patches of one visual token are neighbors. For an image of 2 x 4 patches the order of the grid is
    (0,0) (0,1) (1,0) (1,1)  (0,2) (0,3) (1,2) (1,3).
    """
    rows, columns, channels = image.shape[0] // patch, image.shape[1] // patch, image.shape[2]
    # Axes: row of tokens, row in the token, pixel row, and the same for columns, then channels.
    blocks = image.reshape(rows // merge, merge, patch, columns // merge, merge, patch, channels)
    # Token by token, its patches together; within a patch channel, row, column.
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, channels * patch**2)
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    grid = grid.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(patches), grid.reshape(-1, 2).astype(np.int32)


@dataclass(frozen=True)
class Window:
    """At most 30 s of a clip."""

    index: int  # its number among all windows, those without codes included
    start: int  # its first sample
    samples: int  # its length
    mel_frames: int  # valid ones
    code_frames: int  # at 12.5 Hz; a trailing partial group gives none


def split_windows(samples: int, config: AudioConfig) -> list[tuple[int, int]]:
    """Splits a clip into windows, each `split_overlap` seconds into the one before: (start, length) in samples.

    Windows shorter than one FFT are dropped. At 16 kHz without overlap, 36 s are [(0, 480000), (480000, 96000)].
    """
    longest = config.max_audio_seconds * config.sampling_rate
    step = longest - int(config.split_overlap * config.sampling_rate)
    windows, start = [], 0
    while True:
        length = min(longest, samples - start)
        if length >= config.n_fft:
            windows.append((start, length))
        if start + length >= samples:
            return windows
        start += step


def mel_length(samples: int, config: AudioConfig) -> int:
    """Returns the valid mel frames of a window of `samples`: 16000 -> 101, at most 3000."""
    return min(config.max_mel_frames, samples // config.hop_length + 1)


def clip_windows(samples: int, config: AudioConfig) -> list[Window]:
    """Returns the windows of a clip that yield codes; `index` counts all windows, so it names one of them for good."""
    windows = []
    for index, (start, length) in enumerate(split_windows(samples, config)):
        frames = mel_length(length, config)
        if codes := config.bridge_length(frames):
            windows.append(Window(index, start, length, frames, codes))
    return windows


@lru_cache(maxsize=4)
def _mel_filters(rate: int, n_fft: int, mels: int) -> csr_array:
    """Returns (mels, bins), of which two in a hundred are not zero. A dense product would also start a thread for every
    core in every worker, which then wait for each other.
    """
    from librosa.filters import mel  # takes a second to import

    return csr_array(mel(sr=rate, n_fft=n_fft, n_mels=mels, fmin=0.0, fmax=8000.0, htk=False, norm="slaney"))


def log_mel(samples: Float32[np.ndarray, "t"], config: AudioConfig) -> Float32[np.ndarray, "m f"]:
    """Computes Whisper's log mel of one window of at most 30 s, valid frames only (`mel_length`).

    Periodic Hann, power spectrum, Slaney mels up to 8 kHz, log10 floored at 1e-10 and at the clip's maximum - 8, then
    (x + 4) / 4. The maximum also sees the frame past the valid ones that still touches the signal, as released.
    """
    # Frames that see nothing but padding are skipped: their floor never decides the maximum.
    touched = min(config.max_mel_frames, (len(samples) + config.n_fft // 2) // config.hop_length + 1)
    # Valid frames are cut after the maximum was taken, as released.
    power = _power_spectrum(_reflected(samples, touched, config), config)
    mel = _mel_filters(config.sampling_rate, config.n_fft, config.num_mel_bins) @ power.T
    log = np.log10(np.maximum(mel, 1e-10))
    log = (np.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    return np.ascontiguousarray(log[:, : mel_length(len(samples), config)], dtype=np.float32)


def _reflected(samples: Float32[np.ndarray, "t"], frames: int, config: AudioConfig) -> Float32[np.ndarray, "s"]:
    """Returns what the first `frames` frames see: the window of 30 s filled up with zeros, reflected at both ends."""
    longest, half = config.max_audio_seconds * config.sampling_rate, config.n_fft // 2
    seen = np.zeros((frames - 1) * config.hop_length + config.n_fft, np.float32)
    inside = min(len(samples), len(seen) - half)
    seen[half : half + inside] = samples[:inside]
    seen[:half] = seen[2 * half : half : -1]
    past = len(seen) - half - longest  # samples beyond the 30 s
    if past > 0:
        end = half + longest - 1
        seen[end + 1 :] = seen[end - past : end][::-1]
    return seen


_FRAMES_AT_ONCE = 256  # their transforms stay in the processor's cache


def _power_spectrum(samples: Float32[np.ndarray, "s"], config: AudioConfig) -> Float32[np.ndarray, "f bins"]:
    frames = np.lib.stride_tricks.sliding_window_view(samples, config.n_fft)[:: config.hop_length]
    # float64: in the quietest bins a float32 transform is wrong by 1e-5 of the largest mel.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)
    power = np.empty((len(frames), config.n_fft // 2 + 1), np.float32)
    for first in range(0, len(frames), _FRAMES_AT_ONCE):
        some = slice(first, first + _FRAMES_AT_ONCE)
        power[some] = np.abs(np.fft.rfft(frames[some] * window, axis=-1)) ** 2
    return power


_POWER_FLOOR = 1e-9  # under the root


def mel_target(
    samples: Float32[np.ndarray, "t"], settings: MelTargetSpec, start: int = 0, length: int | None = None
) -> Float32[np.ndarray, "s mels"]:
    """Computes the mel that a decoder learns: of a clip at the settings' rate, or of part of it.

    Natural log of magnitudes. Periodic Hann, not centered: half of n_fft - hop samples are reflected at both ends of
    the clip. Part of a clip has the frames that the whole has there, as it is heard with what lies around it. A clip
    too short to be reflected is padded with zeros first.

    Args:
        samples: (t,), full scale 1, at the settings' rate.
        settings: rate, window, hop, mels and floor.
        start: the first sample of the part.
        length: how many samples it has; None: all from `start` on.

    Returns:
        (frames, mels) float32; `settings.frames` of them.
    """
    pad, left = (settings.n_fft - settings.hop) // 2, len(samples) - start
    frames = settings.frames(max(0, left if length is None else min(length, left)))
    if not frames:
        return np.zeros((0, settings.mels), np.float32)
    whole = np.pad(samples, (0, max(0, pad + 1 - len(samples))))
    padded = np.pad(whole, pad, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, settings.n_fft)[start :: settings.hop][:frames]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.n_fft) / settings.n_fft)
    power = np.abs(np.fft.rfft(windows * hann, axis=-1)) ** 2  # float64: quiet bins need it
    mel = np.sqrt(power + _POWER_FLOOR) @ _filters(settings).T
    return np.log(np.maximum(mel, settings.floor)).astype(np.float32)


@lru_cache(maxsize=8)
def _filters(settings: MelTargetSpec) -> Float32[np.ndarray, "mels f"]:
    from librosa.filters import mel  # takes a second to import, and most data has no such targets

    return mel(sr=settings.rate, n_fft=settings.n_fft, n_mels=settings.mels, fmin=0.0, fmax=HIGHEST, norm="slaney")
