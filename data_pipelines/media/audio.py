"""Audio: how long a file is, its samples at the model's rate, the key of its codes.

Length and samples come from the same look at a file (`audio_track`): where its header promises a length that the file
bears out, that is its length, and decoding must give it; else the file is decoded through to be measured.
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np
import soxr
from jaxtyping import Float32

from data_pipelines.errors import SampleError
from data_pipelines.media.audio_track import LOUDEST, TOLERANCE, AudioTrack, convert_length, open_track
from data_pipelines.media.location import Media, reading

SILENCE = 2.0**-15  # one step of 16 bits: a clip that nowhere exceeds it has nothing to learn from
log = logging.getLogger(__name__)
_REMEMBERED = 65536  # lengths of files that had to be decoded for it, by the hash of their bytes


@dataclass(frozen=True)
class DecodedAudio:
    """Mono samples, full scale 1, and how many damaged packets of the file are missing or silent in them."""

    wave: Float32[np.ndarray, "t"]
    damaged: int = 0


def clip_key(media: Media, window: int) -> tuple[str, int]:
    """Returns the key of a window's codes in the store: SHA-256 of the file's bytes, number of the window from 0."""
    return media.content_hash(), window


def probe_audio(media: Media, rate: int) -> int:
    """Measures the length in samples at `rate` Hz: that of the header where it promises one, else what decoding gives.

    Raises SampleError: "unreadable_media" for a file without audio, one that ends before its header says, an empty one;
    "too_big_media" beyond `limits`.
    """
    with open_track(media) as track:
        samples, found = track.promise.samples, track.promise.rate
        if samples is None:
            samples, found = _measure(media, track)
    if samples <= 0:
        raise SampleError("unreadable_media", f"{media.name} holds no audio")
    return convert_length(samples, found, rate)


def read_audio(media: Media, rate: int) -> DecodedAudio:
    """Decodes the whole clip at `rate` Hz, of the length that `probe_audio` gives.

    Raises SampleError: as `probe_audio`; "unreadable_media" when it cannot be decoded or holds values that are no
    audio; "silent_audio" when it is silent throughout.
    """
    with open_track(media) as track:
        wave, found = _decode(track)
    # Empty first: what follows asks for the loudest sample.
    if not len(wave):
        raise SampleError("unreadable_media", f"{media.name} holds no audio")
    # One pass finds what is no sound at all: values that are not finite, noise of a damaged file, silence.
    loudest = max(wave.max(), -wave.min())
    if not loudest <= LOUDEST:
        what = f"of {loudest:.3g}, where full scale is 1" if np.isfinite(loudest) else "that are not finite"
        raise SampleError("unreadable_media", f"{media.name} holds samples {what}")
    if loudest <= SILENCE:
        raise SampleError("silent_audio", f"{media.name} is silent: no sample exceeds {SILENCE:.1g}")
    if damaged := track.damage.damaged:
        _warn_damaged(media.name, damaged)
    with reading(media, "audio"):
        return DecodedAudio(_resampled(wave, found, rate), damaged)


@lru_cache(maxsize=4096)
def _warn_damaged(name: str, damaged: int) -> None:
    log.warning("%s: packets of audio that are damaged, left out or silent: %d", name, damaged)


def decode_audio(media: Media, samples: int, rate: int) -> Float32[np.ndarray, "t"]:
    """Decodes the wave of `read_audio`, exactly `samples` long (the probed length).

    Raises SampleError as `read_audio`, and "changed" when it is longer or shorter by more than 0.1 s: the file is not
    the one that was measured.
    """
    # A tenth of a second covers what filters and padding of codecs add; more is another file.
    wave = read_audio(media, rate).wave
    if abs(len(wave) - samples) > TOLERANCE * rate:
        raise SampleError("changed", f"{media.name} decodes to {len(wave)} samples at {rate} Hz, measured {samples}")
    return _fitted(wave, samples)


def _fitted(wave: Float32[np.ndarray, "t"], samples: int) -> Float32[np.ndarray, "s"]:
    """Cuts a wave, or fills it with silence at the end."""
    return wave[:samples] if len(wave) >= samples else np.pad(wave, (0, samples - len(wave)))


def _resampled(wave: Float32[np.ndarray, "t"], found: int, rate: int) -> Float32[np.ndarray, "s"]:
    """Resamples to another rate; filters round lengths in their own way, by a sample."""
    # Untouched: what needs no filter stays sample for sample the same.
    if found == rate:
        return wave
    resampled = soxr.resample(wave, found, rate).astype(np.float32, copy=False)
    return _fitted(resampled, convert_length(len(wave), found, rate))


# Both go through the same runs of blocks, so that they agree on the length.
_lengths: OrderedDict[str, tuple[int, int]] = OrderedDict()


def _measure(media: Media, track: AudioTrack) -> tuple[int, int]:
    """Measures samples and rate of a track without a promise, decoded through; remembered, as rows ask for it again."""
    key = media.content_hash()
    if key not in _lengths:
        samples = found = 0
        for rate, run in groupby(track.blocks(), itemgetter(0)):
            found = found or rate
            samples += convert_length(sum(len(block) for _, block in run), rate, found)
        _lengths[key] = samples, found or 1
        while len(_lengths) > _REMEMBERED:
            _lengths.popitem(last=False)
    return _lengths[key]


def _decode(track: AudioTrack) -> tuple[Float32[np.ndarray, "t"], int]:
    """Decodes the samples, at the rate of the first; parts at other rates (joined files) are resampled to it."""
    waves, found = [np.zeros(0, np.float32)], 0
    for rate, run in groupby(track.blocks(), itemgetter(0)):
        found = found or rate
        waves.append(_resampled(np.concatenate([block for _, block in run]), rate, found))
    return np.concatenate(waves), found or 1
