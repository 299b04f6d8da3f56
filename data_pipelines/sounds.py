"""Sounds: their length from the header, their samples at the model's rate, the key of their codes.

soundfile reads wav, flac, ogg and mp3; the audio track of anything else (mp4, webm, ...) comes through PyAV.
"""

import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain

import numpy as np
import soundfile
import soxr
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from jaxtyping import Float32

from data_pipelines.containers import demuxed_duration, header_duration, opened
from data_pipelines.document import SampleError
from data_pipelines.limits import MAX_SOUND_SAMPLES, check_bytes, check_sound
from data_pipelines.media import Media, reading

TOLERANCE = 0.1  # seconds by which decoded audio may differ from its header
SILENCE = 2.0**-15  # one step of 16 bits: a clip that nowhere exceeds it has nothing to learn from
LOUDEST = 16.0  # full scale is 1; lossy codecs overshoot it a little, damaged files and wrong encodings by far
BLOCK = 1 << 20  # values read at once, so that channels are averaged without holding them all
# libsndfile knows many more, of files that nobody trains on and code that nobody tests.
SOUNDFILE_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "MPEG", "AIFF")


def clip_key(media: Media, window: int) -> tuple[str, int]:
    """Key of a window's codes in the store: SHA-256 of the file's bytes, number of the window from 0."""
    return media.content_hash(), window


def probe_sound(media: Media, rate: int) -> int:
    """Length in samples at `rate` Hz, from the header; no sample is decoded.

    Raises SampleError: "unreadable_media" for a file without audio, one that ends before its header says, an empty one;
    "too_big_media" beyond `limits`.
    """
    with _opened(media) as sound:
        samples = _convert_length(sound.frames, sound.samplerate, rate) if sound else _probe_track(media, rate)
    if samples <= 0:
        raise SampleError("unreadable_media", f"{media.name} holds no audio")
    return samples


def decode_sound(media: Media, samples: int, rate: int) -> Float32[np.ndarray, "t"]:
    """Mono audio at `rate` Hz, full scale 1, exactly `samples` long (the probed length).

    Raises SampleError: "changed" when the audio is longer or shorter by more than 0.1 s; "unreadable_media" when it
    cannot be decoded, ends early or holds values that are no sound; "silent_audio" when it is silent throughout.
    """
    with _opened(media) as sound:
        wave, found = _decode_file(sound, media.name) if sound else _decode_track(media)
    loudest = max(wave.max(initial=0.0), -wave.min(initial=0.0))
    if not loudest <= LOUDEST:
        what = f"of {loudest:.3g}, where full scale is 1" if np.isfinite(loudest) else "that are not finite"
        raise SampleError("unreadable_media", f"{media.name} holds samples {what}")
    if loudest <= SILENCE:
        raise SampleError("silent_audio", f"{media.name} is silent: no sample exceeds {SILENCE:.1g}")
    if found != rate:
        with reading(media, "sound"):
            wave = soxr.resample(wave, found, rate).astype(np.float32, copy=False)
    if abs(len(wave) - samples) > TOLERANCE * rate:
        raise SampleError("changed", f"{media.name} decodes to {len(wave)} samples at {rate} Hz, measured {samples}")
    if len(wave) < samples:
        return np.pad(wave, (0, samples - len(wave)))
    return wave[:samples]


def _convert_length(samples: int, found: int, rate: int) -> int:
    return (samples * rate + found // 2) // found


@contextmanager
def _opened(media: Media) -> Iterator[soundfile.SoundFile | None]:
    """The file as soundfile opens it, or None for a format that it does not know.

    Raises SampleError: "unreadable_media" for a truncated file, "too_big_media" beyond `limits`.
    """
    with reading(media, "sound"), media.open() as file, ExitStack() as stack:
        _check_riff(file.read(12), media.size)
        file.seek(0)
        sound = None
        with suppress(soundfile.LibsndfileError, TypeError):  # TypeError: the name ends in .raw
            sound = stack.enter_context(soundfile.SoundFile(file))
        if sound is not None and sound.format not in SOUNDFILE_FORMATS:
            sound = None
        if sound is not None:
            check_bytes(media.size, "sound", media.name)
            check_sound(sound.frames, sound.samplerate, sound.channels, media.name)
        yield sound


def _check_riff(head: bytes, size: int) -> None:
    """libsndfile silently reads what is left of a cut wav file; the RIFF header tells."""
    if size == 0:
        raise ValueError("the file is empty")
    if len(head) == 12 and head[:4] == b"RIFF" and head[8:] == b"WAVE":
        (promised,) = struct.unpack("<I", head[4:8])
        # Streaming writers leave 0 or the largest number; a missing pad byte is common.
        if promised not in (0, 0xFFFFFFFF) and promised + 8 > size + 1:
            raise ValueError(f"the file is truncated: {size} of {promised + 8} bytes")


def _decode_file(sound: soundfile.SoundFile, name: str) -> tuple[Float32[np.ndarray, "t"], int]:
    blocks = sound.blocks(BLOCK // sound.channels, dtype="float32", always_2d=True)
    wave = _joined((_mono(block, 1) for block in blocks), name)
    if len(wave) < sound.frames - TOLERANCE * sound.samplerate:
        raise ValueError(f"the file is truncated: {len(wave)} of {sound.frames} samples")
    return wave, sound.samplerate


def _mono(values: Float32[np.ndarray, "a b"], channels: int) -> Float32[np.ndarray, "t"]:
    """The mean over the axis `channels`."""
    return values.mean(channels) if values.shape[channels] > 1 else values.reshape(-1)


def _joined(blocks: Iterable[Float32[np.ndarray, "_"]], name: str) -> Float32[np.ndarray, "t"]:
    """One after the other; raises SampleError("too_big_media") as soon as there are too many, whatever the header."""
    kept, samples = [np.zeros(0, np.float32)], 0
    for block in blocks:
        kept.append(block)
        samples += len(block)
        if samples > MAX_SOUND_SAMPLES:
            raise SampleError("too_big_media", f"{name} holds more than {MAX_SOUND_SAMPLES} samples of sound")
    return np.concatenate(kept)


def _audio_stream(container: InputContainer, name: str) -> AudioStream:
    if not container.streams.audio:
        raise ValueError("it has no audio track")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise ValueError("its audio codec is unknown")
    if not stream.rate:
        raise ValueError("its audio track has no sampling rate")
    stream.thread_count = 1  # workers are the threads
    seconds = header_duration(stream) or 0.0
    check_sound(round(seconds * stream.rate), stream.rate, stream.channels, name)
    return stream


def _probe_track(media: Media, rate: int) -> int:
    with opened(media, "sound") as container:
        stream = _audio_stream(container, media.name)
        duration = header_duration(stream)
        if duration is None:
            duration = demuxed_duration(container, stream, media.name)
            check_sound(round(duration * stream.rate), stream.rate, stream.channels, media.name)
        return round(duration * rate)


def _decode_track(media: Media) -> tuple[Float32[np.ndarray, "t"], int]:
    with opened(media, "sound") as container:
        stream = _audio_stream(container, media.name)
        wave = _joined(_planes(container, stream), media.name)
        promised = header_duration(stream)
        if promised is not None and len(wave) < (promised - TOLERANCE) * stream.rate:
            raise ValueError(f"the file is truncated: {len(wave) / stream.rate:.1f} of {promised:.1f} s")
        return wave, stream.rate


def _planes(container: InputContainer, stream: AudioStream) -> Iterator[Float32[np.ndarray, "_"]]:
    """Mono samples, block by block. Only the sample format is converted: soxr resamples, as for the other files."""
    convert = AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
    for frame in chain(container.decode(stream), [None]):
        for new in convert.resample(frame):
            yield _mono(new.to_ndarray(), 0)
