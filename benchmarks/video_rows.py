"""What does a row of 65,536 tokens full of 1080p video cost a host, in CPU seconds?

    python benchmarks/video_rows.py [--json] [--seconds 24] [--codec libx264]

Videos of 1920x1080 at 30 frames a second are made here with PyAV: a panned texture, a moving block and noise, their key
frames 1, 2 and 8.3 s (x264's default) apart. Measured is the CPU time of one process for the frames that fill the row's
budget of patches (131,072): decoding, colors, resizing, patches, one frame a second. Before: every frame of the video
is decoded. After: only what wanted frames need; and frames that were extracted when the shards were built
(`data build --frames 1fps`). Patches are compared with those of the whole decode.
"""

import argparse
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
from rows import emit, row

from baichuan_omni_jax.config import baichuan_omni_7b
from data_pipelines.media import sparse_decoding, videos
from data_pipelines.media.features import patchify, resize_image, visual_size
from data_pipelines.media.frame_tracks import FrameSpec, extract_frames
from data_pipelines.media.location import Media
from data_pipelines.media.videos import read_video

HEIGHT, WIDTH, RATE = 1080, 1920, 30
PATCHES = 131_072  # of a row
GROUPS = {"1 s": 30, "2 s": 60, "8.3 s": 250}  # frames from key frame to key frame
GOAL = 0.25


def make_video(path: Path, seconds: int, group: int, codec: str) -> Path:
    """Writes a video that pans over a texture."""
    random = np.random.default_rng(0)
    texture = random.normal(size=(HEIGHT // 4 + 80, WIDTH // 4 + 200)).astype(np.float32)
    for _ in range(3):  # smoothed: neighboring pixels of real images are alike
        texture = sum(np.roll(texture, shift, axis) for shift in (0, 1, -1) for axis in (0, 1)) / 3
    texture = np.kron((texture - texture.min()) / np.ptp(texture) * 200, np.ones((4, 4), np.float32))
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=RATE, options={"g": str(group)})
        track.height, track.width, track.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(seconds * RATE):
            top, left = int(100 + 90 * np.sin(number / 40)), 3 * number % 600
            image = texture[top : top + HEIGHT, left : left + WIDTH] + random.integers(-4, 5, (HEIGHT, 1))
            place = 11 * number % (WIDTH - 200)
            image[200:400, place : place + 200] += 50
            gray = np.clip(image, 0, 255).astype(np.uint8)
            pixels = np.stack([gray, np.roll(gray, 7, 1), 255 - gray], -1)
            container.mux(track.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(track.encode(None))
    return path


@contextmanager
def whole_decode():
    """Decodes every frame, as before frames were passed over."""
    with patch.object(sparse_decoding, "_RESTARTING", frozenset()), patch.object(videos, "_JUMP", float("inf")):
        yield


def read_patches(media: Media) -> tuple[np.ndarray, float]:
    """Returns the patches of a video's frames at one a second, and the CPU seconds that they took."""
    vision = baichuan_omni_7b().vision
    begun = time.process_time()
    probe, frames = read_video(media, vision.frames_per_second, vision.max_frames)
    height, width = visual_size(probe.height, probe.width, vision, frame=True)
    patches = [patchify(resize_image(frame, height, width))[0] for frame in frames]
    return np.stack(patches), time.process_time() - begun


def measure(seconds: int, codec: str, folder: Path) -> list[dict]:
    rows = []
    for name, group in GROUPS.items():
        path = make_video(folder / f"{group}.mp4", seconds, group, codec)
        video = Media(path.name, path)
        with whole_decode():
            expected, before = read_patches(video)
        # One row holds the frames of as many such videos as fill its patches.
        scale = PATCHES / (expected.shape[0] * expected.shape[1])
        found, sparse = read_patches(video)
        if not np.array_equal(found, expected):
            raise SystemExit(f"key frames {name} apart: other frames than by decoding all")
        begun = time.process_time()
        extracted = Media("frames.mov", None, extract_frames(video, FrameSpec(1.0), 1 << 30))
        building = time.process_time() - begun
        given, kept = read_patches(extracted)
        loss = np.abs(given.astype(int) - expected).mean()
        size = extracted.size / path.stat().st_size
        told = f"{codec}, key frames {name} apart; {scale * expected.shape[0]:.0f} frames a row"
        peer = {"peer": "every frame decoded", "peer_value": scale * before}
        rows += [
            row(
                f"row_cpu_s_video_{group}",
                scale * sparse,
                "s",
                **peer,
                ratio=sparse / before,
                note=f"{told}; the same pixels",
            ),
            row(
                f"row_cpu_s_frames_{group}",
                scale * kept,
                "s",
                **peer,
                ratio=kept / before,
                goal=f"<= {GOAL}",
                ok=kept / before <= GOAL,
                note=f"{told}; JPEG differs by {loss:.2f} of 255 on average; {size:.2f} of the video's bytes; "
                f"extracting cost {building / seconds:.3f} CPU-s a second of video, once",
            ),
        ]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seconds", type=int, default=24, help="length of a video, at most 32")
    parser.add_argument("--codec", default="libx264")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return emit(measure(options.seconds, options.codec, Path(folder)), options.json)


if __name__ == "__main__":
    sys.exit(main())
