"""Figures of the report page: curves as SVG, pictures, videos and sounds as data URIs. Nothing is fetched.

Colors are the classes `c0` to `c7` of report_page.css, which has them for light and dark.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from baichuan_omni_jax.evaluation.chain_record import number
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import read_audio
from data_pipelines.media.images import load_image
from data_pipelines.media.location import Media
from data_pipelines.media.videos import read_video

Point = tuple[float, float]

COLORS = 8  # a figure with more curves leaves the others out
_LEVEL_LOSS = re.compile(r"_q\d+$")  # losses of single levels of codes: too many for a figure
_WIDTH, _HEIGHT = 360, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 8, 22
_POINTS = 160  # of a curve: beyond, neighbors are averaged
_SIDE = 160  # pixels of a picture's longer side
_FRAMES, _FRAME_RATE, _FRAME_MS = 8, 4.0, 350  # of a video: it is shown as a moving picture
_BYTES = 1 << 26  # of a file that is shown: all of it is read for a few seconds
_RATE, _SECONDS = 16000, 8  # of a sound


@dataclass(frozen=True)
class Axes:
    """What a figure spans. `marks` are places on x to draw a line at, with what begins there."""

    x: tuple[float, float]
    y: tuple[float, float]
    percent: bool = False
    marks: Sequence[tuple[float, str]] = ()


def thin(points: Sequence[Point], most: int = _POINTS) -> list[Point]:
    """Averages neighbors until at most so many points are left.

    >>> thin([(1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0)], 2)
    [(1.5, 3.0), (3.5, 7.0)]
    """
    if len(points) <= most:
        return list(points)
    parts = np.array_split(np.asarray(points, np.float64), most)
    return [(float(x), float(y)) for x, y in (part.mean(0) for part in parts)]


def span(curves: Mapping[str, Sequence[Point]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns what curves span on both axes: from 0 up, or from below where they go there."""
    xs = [x for curve in curves.values() for x, _ in curve]
    ys = [y for curve in curves.values() for _, y in curve]
    return _wide(0.0, max(xs, default=1.0)), _wide(min(0.0, min(ys, default=0.0)), max(ys, default=1.0))


def _wide(low: float, high: float) -> tuple[float, float]:
    return (low, high) if high > low else (low, low + 1.0)


def line_chart(
    title: str, curves: Mapping[str, Sequence[Point]], axes: Axes, levels: Mapping[str, float] | None = None
) -> str:
    """Draws curves over steps, as a figure with a legend.

    Args:
        title: what it shows.
        curves: points (step, value) by name; at most `COLORS`.
        axes: what it spans.
        levels: horizontal lines by name, such as chance: dashed, in the order of the classes `level0`, `level1`.

    Returns:
        HTML.
    """
    frame = _Frame(axes)
    shown, levels = dict(list(curves.items())[:COLORS]), levels or {}
    parts = [frame.grid()]
    for n, (name, level) in enumerate(levels.items()):
        y = frame.y(level)
        line = f'<line class="level{n}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
        parts.append(f"{line}<title>{escape(name)} {_value(level, axes)}</title></line>")
    for n, (name, curve) in enumerate(shown.items()):
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve)
        parts.append(f'<polyline class="c{n}" points="{points}"/>')
        # Few points are measurements of their own, and each of them tells its value.
        if len(curve) <= _POINTS // 4:
            parts += [
                f'<circle class="c{n}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
                f"<title>{escape(name)}, step {x:.0f}: {_value(y, axes)}</title></circle>"
                for x, y in curve
            ]
    keys = [f'<span class="key c{n}">{escape(name)}</span>' for n, name in enumerate(shown)] if len(shown) > 1 else []
    keys += [f'<span class="key level{n}">{escape(name)}</span>' for n, name in enumerate(levels)]
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}<div>{' '.join(keys)}</div></figure>"


class _Frame:
    """Where values lie in the drawing. Values beyond the axes are drawn at their ends."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes

    def x(self, value: float) -> float:
        return _LEFT + _place(value, self._axes.x) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - _place(value, self._axes.y) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        """Draws three lines across with their values, the first and the last step, and the marks."""
        low, high = self._axes.y
        parts = []
        for value in (low, (low + high) / 2, high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_value(value, self._axes)}</text>')
        for place, name in self._axes.marks:
            x = self.x(place)
            line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
            parts.append(f"{line}<title>{escape(name)}</title></line>")
        for value, anchor in zip(self._axes.x, ("start", "end"), strict=True):
            parts.append(f'<text x="{self.x(value):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{value:.0f}</text>')
        return "".join(parts)


def _place(value: float, ends: tuple[float, float]) -> float:
    return min(max((value - ends[0]) / (ends[1] - ends[0]), 0.0), 1.0)


def _value(value: float, axes: Axes) -> str:
    return f"{100 * value:.0f} %" if axes.percent else f"{value:.3g}"


def loss_curves(records: Sequence[Mapping]) -> dict[str, list[Point]]:
    """Finds the curves of a run's loss: whole and by parts in training, whole of each held-out mixture."""
    curves: dict[str, list[Point]] = {}
    for record in records:
        for key, value in record.items():
            parts = key.split("/")
            if key == "loss":
                name = "loss"
            elif key.startswith("loss_") and len(parts) == 1 and not _LEVEL_LOSS.search(key):
                name = key.removeprefix("loss_")
            elif len(parts) == 3 and parts[0] == "eval" and parts[2] == "loss":
                name = f"held out: {parts[1]}"
            else:
                continue
            if (found := number(value)) is not None:
                curves.setdefault(name, []).append((float(record["step"]), found))
    # With one part alone the whole is drawn twice.
    if len([name for name in curves if name != "loss" and ":" not in name]) == 1:
        curves = {name: curve for name, curve in curves.items() if name == "loss" or ":" in name}
    return {name: thin(curve) for name, curve in list(curves.items())[:COLORS]}


def media_tag(kind: str, path: Path) -> str:
    """Embeds a picture, a video (as a moving picture) or a sound; a sentence where it cannot be read.

    Args:
        kind: `image`, `video` or `audio`.
        path: the file.
    """
    media, name = Media(path.name, path), escape(path.name, quote=True)
    try:
        # A pipe or a device would be read for ever.
        if not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "there is no such file")
        if path.stat().st_size > _BYTES:
            raise ValueError(f"it has more than {_BYTES >> 20} MiB")
        if kind == "audio":
            return f'<audio controls preload="none" src="{_sound(media)}" title="{name}"></audio>'
        uri = _video(media) if kind == "video" else _picture(media)
        return f'<img src="{uri}" alt="{name}" loading="lazy">'
    except (SampleError, OSError, ValueError, RuntimeError) as error:
        return f'<span class="missing">{name} cannot be shown: {escape(str(error))}</span>'


def _picture(media: Media) -> str:
    image = load_image(media)
    image.thumbnail((_SIDE, _SIDE))
    return _encoded(image, "PNG")


def _video(media: Media) -> str:
    _, frames = read_video(media, _FRAME_RATE, _FRAMES)
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((_SIDE, _SIDE))
    return _encoded(images[0], "GIF", save_all=True, append_images=images[1:], duration=_FRAME_MS, loop=0)


def _encoded(image: Image.Image, form: str, **options: object) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return _uri(f"image/{form.lower()}", file.getvalue())


def _sound(media: Media) -> str:
    wave = read_audio(media, _RATE).wave[: _SECONDS * _RATE]
    # MP3 is a tenth of the bytes, and all browsers play it; a libsndfile before 1.1 cannot write it.
    form, kind = ("MP3", "mpeg") if "MP3" in soundfile.available_formats() else ("WAV", "wav")
    file = io.BytesIO()
    soundfile.write(file, wave, _RATE, format=form)
    return _uri(f"audio/{kind}", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
