"""Sounds: their length from the header, their samples at the model's rate, the key of their codes.

soundfile reads wav, flac, ogg and mp3; the audio track of anything else (mp4, webm, ...) comes through PyAV.
"""

import struct

import numpy as np
import soundfile
import soxr
from av.audio.resampler import AudioResampler
from jaxtyping import Float32

from data_pipelines.containers import demuxed_duration, header_duration, opened
from data_pipelines.document import SampleError
from data_pipelines.media import Media, reading

TOLERANCE = 0.1  # seconds by which decoded audio may differ from its header
MAX_SECONDS = 24 * 3600
BLOCK = 1 << 20  # samples read at once, so that channels are averaged without holding them all


def clip_key(media: Media, window: int) -> tuple[str, int]:
    """Key of a window's codes in the store: SHA-256 of the file's bytes, number of the window from 0."""
    return media.content_hash(), window


def probe_sound(media: Media, rate: int) -> int:
    """Length in samples at `rate` Hz, from the header; no sample is decoded.

    Raises SampleError("unreadable_media") for a file without audio, one that ends before its header says, an empty one.
    """
    info = _sound_info(media)
    samples = _convert_length(info.frames, info.samplerate, rate) if info else _probe_track(media, rate)
    if samples <= 0:
        raise SampleError("unreadable_media", f"{media.name} holds no audio")
    if samples > MAX_SECONDS * rate:  # a broken header: do not even lay it out
        raise SampleError("unreadable_media", f"{media.name} claims to be {samples / rate / 3600:.0f} hours long")
    return samples


def decode_sound(media: Media, samples: int, rate: int) -> Float32[np.ndarray, "t"]:
    """Mono audio at `rate` Hz in [-1, 1], exactly `samples` long (the probed length).

    Raises SampleError: "changed" when the audio is longer or shorter by more than 0.1 s; "unreadable_media" when it
    cannot be decoded, ends early or holds values that are no numbers.
    """
    wave, found = _decode_file(media) if _sound_info(media) else _decode_track(media)
    if not np.isfinite(wave).all():
        raise SampleError("unreadable_media", f"{media.name} holds samples that are not finite")
    if found != rate:
        with reading(media, "sound"):
            wave = soxr.resample(wave, found, rate).astype(np.float32)
    if abs(len(wave) - samples) > TOLERANCE * rate:
        raise SampleError("changed", f"{media.name} decodes to {len(wave)} samples at {rate} Hz, measured {samples}")
    return np.pad(wave[:samples], (0, max(0, samples - len(wave))))


def _convert_length(samples: int, found: int, rate: int) -> int:
    return (samples * rate + found // 2) // found


def _sound_info(media: Media) -> "soundfile._SoundFileInfo | None":
    """soundfile's header, or None when it does not know the format. Raises SampleError for a truncated file."""
    with reading(media, "sound"), media.open() as file:
        _check_riff(file.read(12), file.seek(0, 2))
        file.seek(0)
        try:
            return soundfile.info(file)
        except (soundfile.LibsndfileError, TypeError):  # TypeError: the name ends in .raw
            return None


def _check_riff(head: bytes, size: int) -> None:
    """libsndfile silently reads what is left of a cut wav file; the RIFF header tells."""
    if size == 0:
        raise ValueError("the file is empty")
    if len(head) == 12 and head[:4] == b"RIFF" and head[8:] == b"WAVE":
        (promised,) = struct.unpack("<I", head[4:8])
        # Streaming writers leave 0 or the largest number; a missing pad byte is common.
        if promised not in (0, 0xFFFFFFFF) and promised + 8 > size + 1:
            raise ValueError(f"the file is truncated: {size} of {promised + 8} bytes")


def _decode_file(media: Media) -> tuple[Float32[np.ndarray, "t"], int]:
    with reading(media, "sound"), media.open() as file, soundfile.SoundFile(file) as sound:
        blocks = [block.mean(1) for block in sound.blocks(BLOCK, dtype="float32", always_2d=True)]
        wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        if len(wave) < sound.frames - TOLERANCE * sound.samplerate:
            raise ValueError(f"the file is truncated: {len(wave)} of {sound.frames} samples")
        return wave, sound.samplerate


def _probe_track(media: Media, rate: int) -> int:
    with opened(media, "sound") as container:
        if not container.streams.audio:
            raise ValueError("it has no audio track")
        stream = container.streams.audio[0]
        duration = header_duration(stream)
        return round((demuxed_duration(container, stream) if duration is None else duration) * rate)


def _decode_track(media: Media) -> tuple[Float32[np.ndarray, "t"], int]:
    with opened(media, "sound") as container:
        if not container.streams.audio:
            raise ValueError("it has no audio track")
        stream = container.streams.audio[0]
        # Only the sample format is converted here: soxr resamples, as for the other files.
        convert = AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        frames = [new for frame in container.decode(stream) for new in convert.resample(frame)]
        frames += convert.resample(None)
        wave = np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray().mean(0) for frame in frames)])
        promised = header_duration(stream)
        if promised is not None and len(wave) < (promised - TOLERANCE) * stream.rate:
            raise ValueError(f"the file is truncated: {len(wave) / stream.rate:.1f} of {promised:.1f} s")
        return wave, stream.rate
