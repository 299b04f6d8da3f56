"""Stills as a person sees them: upright, over white, of any depth, in sRGB; and as the released processor has them."""

import io
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from baichuan_omni_jax.config import (
    DataConfig,
    ImagesConfig,
    RunConfig,
    SourceConfig,
    apply_overrides,
    released_images,
    tiny,
)
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.errors import SampleError
from data_pipelines.media import images
from data_pipelines.media.images import decode_image, probe_image
from data_pipelines.media.location import Media
from data_pipelines.pipeline import open_pipeline
from tests.helpers.deep_images import RAMP, chunk, pixels_of, png_bytes, tiff_bytes
from tests.helpers.small_media import media, noise_image

# EXIF: where the stored image's first row and first column lie in what is seen.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_as(upright, orientation):
    """The pixels that a file with this orientation stores to show `upright`."""
    height, width = upright.shape[:2]
    first_row, first_column = SIDES[orientation]
    place = {
        "top": lambda n: ("y", n),
        "bottom": lambda n: ("y", height - 1 - n),
        "left": lambda n: ("x", n),
        "right": lambda n: ("x", width - 1 - n),
    }
    rows, columns = (height, width) if first_row in ("top", "bottom") else (width, height)
    stored = np.zeros((rows, columns, 3), np.uint8)
    for row in range(rows):
        for column in range(columns):
            at = dict([place[first_row](row), place[first_column](column)])
            stored[row, column] = upright[at["y"], at["x"]]
    return stored


class TestOrientation:
    @pytest.mark.parametrize("orientation", SIDES)
    def test_each_of_the_eight(self, tmp_path, orientation):
        upright, exif = noise_image(20, 30), Image.Exif()
        exif[0x0112] = orientation
        stored = stored_as(upright, orientation)
        for name, options in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.tif", {})):
            path = tmp_path / name
            Image.fromarray(stored).save(path, exif=exif, **options)
            assert probe_image(media(path)) == (20, 30)
            np.testing.assert_array_equal(decode_image(media(path)), upright)
        Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
        assert probe_image(media(tmp_path / "a.jpg")) == decode_image(media(tmp_path / "a.jpg")).shape[:2] == (20, 30)

    def test_released_pixels_are_as_stored(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise_image(20, 30)).save(tmp_path / "a.png", exif=exif)
        for settings in (ImagesConfig(orientation="released"), released_images()):
            assert probe_image(media(tmp_path / "a.png"), settings) == (20, 30)
            np.testing.assert_array_equal(decode_image(media(tmp_path / "a.png"), settings), noise_image(20, 30))

    def test_exif_behind_the_pixels_or_damaged(self, tmp_path):
        entry = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
        for data, size in ((entry, (30, 20)), (entry[:15], (20, 30)), (b"MM junk", (20, 30))):
            found = pixels_of(tmp_path / "a.png", png_bytes(noise_image(20, 30), after=chunk(b"eXIf", data)))
            assert found.shape[:2] == size


class TestRefusals:
    def message(self, tmp_path, name, data):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SampleError) as caught:
            probe_image(media(tmp_path / name))
        assert caught.value.cause == "unreadable_media"
        told = str(caught.value)
        assert told.startswith(name)
        assert "<" not in told
        assert str(tmp_path) not in told
        return told

    def test_what_cannot_be_read_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        heic = struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(100)
        assert "HEIC" in (told := self.message(tmp_path, "a.heic", heic))
        assert "extra heif" in told
        floats = tiff_bytes(np.zeros((20, 30, 3), np.float32))
        assert "3 samples of 32 bits (floating point)" in self.message(tmp_path, "a.tif", floats)
        assert "raw image of a camera" in self.message(tmp_path, "a.dng", tiff_bytes(RAMP, t50706=1))
        assert "raw image of a camera" in self.message(tmp_path, "a.nef", tiff_bytes(RAMP, t254=1, t330=8))
        self.message(tmp_path, "a.bin", bytes(range(256)))

    def test_planes_of_16_bits(self, tmp_path):
        (tmp_path / "a.tif").write_bytes(tiff_bytes(np.stack([RAMP] * 3, -1), t284=2))
        with pytest.raises(SampleError, match="planes of their own"):
            decode_image(media(tmp_path / "a.tif"))

    def test_heif_with_its_extra(self, tmp_path):
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(tmp_path / "a.heic", quality=100)
        found = decode_image(media(tmp_path / "a.heic"))
        assert probe_image(media(tmp_path / "a.heic")) == found.shape[:2] == (48, 64)
        assert np.abs(found.astype(int) - (200, 30, 40)).max() <= 4

    def test_avif_is_no_heif(self):
        avif = struct.pack(">I", 28) + b"ftypmif1" + bytes(4) + b"avifmif1miaf"
        assert not images._is_heif(io.BytesIO(avif))
        assert images._is_heif(io.BytesIO(avif.replace(b"avif", b"heic")))


def test_settings_of_a_run():
    run = apply_overrides(RunConfig(name="x"), ["data.images.orientation=released"])
    assert run.data.images == ImagesConfig(orientation="released")
    with pytest.raises(ConfigError, match=r"data.images.alpha must be .*'seen'.*'released'|seen, released"):
        apply_overrides(RunConfig(name="x"), ["data.images.alpha=black"])


def test_the_settings_of_a_run_reach_its_index(tmp_path):
    """Each setting has an index of its own: of a turned image of 28 x 112, 8 x 2 patches or 2 x 8."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise_image(28, 112)).save(tmp_path / "a.png", exif=exif)
    text = '<img_start_baichuan>{"path": "a.png"}<img_end_baichuan><trainable_start>cat<trainable_end>'
    (tmp_path / "all.jsonl").write_text(json.dumps({"text": text}))
    grids = []
    for settings in (ImagesConfig(), released_images()):
        sources = (SourceConfig(name="all", manifest="all.jsonl"),)
        config = DataConfig(root=str(tmp_path), mixture=sources, workers=0, images=settings)
        pipeline = open_pipeline(config, tiny())
        (index,) = pipeline.indexes
        grids.append((pipeline.processor.encode(index.document(0), None).patch_grid.max(0) + 1).tolist())
        assert index.image_patches(0) == [np.prod(grids[-1])]
    assert grids == [[8, 2], [2, 8]]
    assert sum(path.is_dir() for path in (tmp_path / ".cache").glob("all-*")) == 2


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), color) for color in ((255, 0, 0), (0, 255, 0))]
    for name in ("a.gif", "a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert decode_image(media(tmp_path / name))[0, 0].tolist() == [255, 0, 0]
    whole = (tmp_path / "a.png").read_bytes()
    assert decode_image(Media("x", None, whole)).shape == (20, 20, 3)
