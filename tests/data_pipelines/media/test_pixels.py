"""From stored values to 8-bit sRGB: transparency, depth, color profiles, chunks of PNG."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from baichuan_omni_jax.config import (
    ImagesConfig,
    released_images,
)
from data_pipelines.errors import SampleError
from data_pipelines.media.images import decode_image, probe_image
from data_pipelines.media.pixels import full_scale
from tests.helpers.deep_images import RAMP, chunk, pixels_of, png_bytes, profile_bytes, tiff_bytes
from tests.helpers.small_media import media, noise_image


class TestTransparency:
    """Over white: value * alpha + 255 * (1 - alpha)."""

    def test_modes_with_alpha(self, tmp_path):
        for mode, stored, expected in (
            ("RGBA", (200, 100, 0, 51), (244, 224, 204)),
            ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
            ("LA", (100, 102), (193, 193, 193)),
        ):
            for name in ("a.png", "a.webp", "a.tif"):
                options = {"lossless": True, "exact": True} if name == "a.webp" else {}
                Image.new(mode, (20, 20), stored).save(tmp_path / name, **options)
                found = decode_image(media(tmp_path / name)).astype(int)
                assert np.abs(found - expected).max() <= 1, (mode, name)
                dropped = decode_image(media(tmp_path / name), ImagesConfig(alpha="released"))
                assert tuple(dropped[0, 0].tolist()) == Image.open(tmp_path / name).convert("RGB").getpixel((0, 0)), (
                    name
                )

    def test_palettes_and_transparent_colors(self, tmp_path):
        palette = Image.new("P", (20, 20))
        palette.putpalette([10, 20, 30, 40, 50, 60])
        palette.paste(1, (10, 0, 20, 20))
        for name, key in (("a.png", b"\x00\x80"), ("b.png", 0), ("c.gif", 0)):
            palette.save(tmp_path / name, transparency=key)
            left, right = decode_image(media(tmp_path / name))[0, [0, 19]].tolist()
            assert left == [255, 255, 255]
            assert right == ([147, 152, 157] if isinstance(key, bytes) else [40, 50, 60])
        halves = np.repeat([[5, 9]], 10, axis=1).repeat(20, axis=0).astype(np.uint8)
        key = chunk(b"tRNS", struct.pack(">H", 5))
        for bits in (4, 8):
            found = pixels_of(tmp_path / "gray.png", png_bytes(halves, key, bits=bits if bits < 8 else 0))
            assert found[0, [0, 19], 0].tolist() == [255, 9 * 255 // 15 if bits == 4 else 9]
        found = pixels_of(tmp_path / "bits.png", png_bytes(halves % 2, chunk(b"tRNS", bytes(2)), bits=1))
        assert found.min() == 255
        colors = np.stack([halves] * 3, -1)
        found = pixels_of(tmp_path / "rgb.png", png_bytes(colors, chunk(b"tRNS", struct.pack(">3H", 5, 5, 5))))
        assert found[0, [0, 19], 0].tolist() == [255, 9]

    def test_transparent_values_of_16_bits(self, tmp_path):
        values = np.where(np.arange(30) < 15, 0x8001, 0x8002).astype(np.uint16)[None].repeat(20, axis=0)
        found = pixels_of(tmp_path / "a.png", png_bytes(values, chunk(b"tRNS", b"\x80\x01")))
        assert found[0, [0, 29], 0].tolist() == [255, 128]
        found = pixels_of(tmp_path / "b.png", png_bytes(np.stack([values] * 3, -1), chunk(b"tRNS", b"\x80\x01" * 3)))
        assert found[0, [0, 29], 0].tolist() == [255, 128]


class TestDepth:
    def scaled(self, path, data, expected, *settings):
        found = pixels_of(path, data, *settings)
        expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, found.shape)
        assert np.abs(found - expected).max() <= 1
        return found

    def test_white_by_what_is_declared_or_by_the_largest_value(self):
        assert [full_scale(largest, 0, 16) for largest in (0, 255, 256, 1023, 4095, 4096, 30000)] == [
            255,
            255,
            1023,
            1023,
            4095,
            16383,
            65535,
        ]
        assert [full_scale(100, 12, 16), full_scale(5000, 12, 16), full_scale(2**20, 0, 32)] == [4095, 65535, 2**24 - 1]

    def test_sixteen_bits_of_every_format(self, tmp_path):
        exact = RAMP / 65535 * 255
        color = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
        for values, expected in ((RAMP, exact), (color, color / 65535 * 255)):
            self.scaled(tmp_path / "a.png", png_bytes(values), expected)
            for order in "<>":
                for packed in (False, True):
                    self.scaled(tmp_path / "a.tif", tiff_bytes(values, order, packed), expected)
        self.scaled(tmp_path / "a.pgm", b"P5 30 20 65535\n" + RAMP.astype(">u2").tobytes(), exact)
        self.scaled(tmp_path / "a.ppm", b"P6 30 20 65535\n" + color.astype(">u2").tobytes(), color / 65535 * 255)
        alpha = np.concatenate([color, np.full_like(color[..., :1], 0x4000)], -1)
        share = 0x4000 / 65535
        self.scaled(tmp_path / "b.png", png_bytes(alpha), color / 65535 * 255 * share + 255 * (1 - share))
        gray = np.stack([RAMP, np.full_like(RAMP, 0x4000)], -1)
        self.scaled(tmp_path / "c.png", png_bytes(gray), exact * share + 255 * (1 - share))

    def test_twelve_bits_in_sixteen_are_not_black(self, tmp_path):
        values = (RAMP >> 4).astype(np.uint16)
        color = np.stack([values, values[::-1], values], -1)
        for each in (values, color):
            found = self.scaled(tmp_path / "a.png", png_bytes(each), each / 4095 * 255)
            assert len(np.unique(found)) == 256
            self.scaled(tmp_path / "a.tif", tiff_bytes(each), each / 4095 * 255)
        self.scaled(tmp_path / "a.pgm", b"P5 30 20 4095\n" + values.astype(">u2").tobytes(), values / 4095 * 255)
        self.scaled(tmp_path / "a.ppm", b"P6 30 20 4095\n" + color.astype(">u2").tobytes(), color / 4095 * 255)

    def test_a_declared_depth_counts_before_the_largest_value(self, tmp_path):
        dark = (RAMP >> 8).astype(np.uint16)  # at most 255 of 4095
        self.scaled(tmp_path / "a.png", png_bytes(dark, chunk(b"sBIT", b"\x0c")), dark / 4095 * 255)
        self.scaled(tmp_path / "a.png", png_bytes(RAMP, chunk(b"sBIT", b"\x0c")), RAMP / 65535 * 255)
        self.scaled(tmp_path / "a.tif", tiff_bytes(dark, t281=4095), dark / 4095 * 255)
        self.scaled(tmp_path / "a.pgm", b"P5 30 20 4095\n" + dark.astype(">u2").tobytes(), dark / 4095 * 255)

    def test_signed_and_32_bits(self, tmp_path):
        hounsfield = np.linspace(-1024, 3071, 600).round().astype(np.int16).reshape(20, 30)
        for order in "<>":
            self.scaled(tmp_path / "a.tif", tiff_bytes(hounsfield, order), (hounsfield + 4096) / 8191 * 255)
        large = RAMP.astype(np.uint32) * 65537
        self.scaled(tmp_path / "b.tif", tiff_bytes(large), large / (2**32 - 1) * 255)
        self.scaled(tmp_path / "c.tif", tiff_bytes(RAMP.astype(np.int32)), RAMP / 65535 * 255)

    def test_floats(self, tmp_path):
        unit = (RAMP / 65535).astype(np.float32)
        for values, expected in (
            (unit, unit * 255),
            (unit * 255, unit * 255),
            (unit * 7, unit * 7 / 8 * 255),
            (unit * 2 - 1, unit * 255),
        ):
            for order in "<>":
                self.scaled(tmp_path / "a.tif", tiff_bytes(values.astype(np.float32), order), expected)
        self.scaled(
            tmp_path / "b.tif", tiff_bytes(unit * 1000, t340=200.0, t341=700.0), np.clip(unit * 2 - 0.4, 0, 1) * 255
        )
        self.scaled(tmp_path / "a.pfm", b"Pf\n30 20\n-1.0\n" + unit[::-1].astype("<f4").tobytes(), unit * 255)

    def test_zero_is_white_where_the_file_says_so(self, tmp_path):
        self.scaled(tmp_path / "a.tif", tiff_bytes(RAMP, t262=0), 255 - RAMP / 65535 * 255)
        self.scaled(tmp_path / "b.tif", tiff_bytes((RAMP / 65535).astype(np.float32), t262=0), 255 - RAMP / 257)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_no_numbers(self, tmp_path, value):
        values = np.full((20, 30), 0.5, np.float32)
        values[3, 4] = value
        (tmp_path / "a.tif").write_bytes(tiff_bytes(values))
        with pytest.raises(SampleError, match=r"a.tif .* holds values that are no numbers") as caught:
            decode_image(media(tmp_path / "a.tif"))
        assert caught.value.cause == "unreadable_media"

    def test_released_is_what_pillow_converts(self, tmp_path):
        for name, data in (("a.png", png_bytes(RAMP)), ("b.png", png_bytes(np.stack([RAMP] * 3, -1)))):
            found = pixels_of(tmp_path / name, data, released_images())
            np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_eight_bits_are_never_stretched(self, tmp_path):
        dark = (RAMP >> 12).astype(np.uint8)
        assert pixels_of(tmp_path / "a.png", png_bytes(dark)).max() == 15


# Colorants in D50 as the standards' profiles have them.
SRGB = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.71410)}


DISPLAY_P3 = {"r": (0.51512, 0.24120, -0.00105), "g": (0.29198, 0.69225, 0.04189), "b": (0.15710, 0.06657, 0.78407)}


ADOBE = {"r": (0.60974, 0.31111, 0.01947), "g": (0.20528, 0.62567, 0.06087), "b": (0.14919, 0.06322, 0.74457)}


COLOR = (180, 120, 60)


def in_srgb(color, colorants, gamma):
    """By the definition: curves, colorants to XYZ, back through sRGB's colorants and curve."""
    linear = (np.array(color) / 255) ** (round(gamma * 256) / 256)
    matrix = lambda each: np.array([each[name] for name in "rgb"]).T  # noqa: E731
    values = np.clip(np.linalg.solve(matrix(SRGB), matrix(colorants) @ linear), 0, 1)
    return np.where(values <= 0.0031308, 12.92 * values, 1.055 * values ** (1 / 2.4) - 0.055) * 255


class TestProfiles:
    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg"])
    @pytest.mark.parametrize("colorants", [DISPLAY_P3, ADOBE], ids=["p3", "adobe"])
    def test_wide_gamuts(self, tmp_path, name, colorants):
        expected = in_srgb(COLOR, colorants, 2.2)
        assert np.abs(expected - COLOR).max() > 5
        options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 100, "subsampling": 0}}.get(name, {})
        profile = profile_bytes(colorants, 2.2)
        Image.new("RGB", (20, 20), COLOR).save(tmp_path / name, icc_profile=profile, **options)
        found = decode_image(media(tmp_path / name)).astype(int)
        assert np.abs(found - expected).max() <= 3
        plain = decode_image(media(tmp_path / name), ImagesConfig(profile="released")).astype(int)
        assert np.abs(plain - COLOR).max() <= 1

    def test_transparency_and_depth_beside_a_profile(self, tmp_path):
        expected = in_srgb(COLOR, ADOBE, 2.2)
        profile = chunk(b"iCCP", b"a\x00\x00" + zlib.compress(profile_bytes(ADOBE, 2.2)))
        deep = np.full((20, 20, 4), [*np.array(COLOR) * 257, 0x8000], np.uint16)
        found = pixels_of(tmp_path / "a.png", png_bytes(deep, profile))
        assert np.abs(found - (expected + 255) / 2).max() <= 2

    def test_gray(self, tmp_path):
        linear = profile_bytes({}, 1.0, b"GRAY")
        Image.new("L", (20, 20), 128).save(tmp_path / "a.png", icc_profile=linear)
        assert np.abs(decode_image(media(tmp_path / "a.png")).astype(int) - 188).max() <= 1  # sRGB of 0.502
        Image.new("L", (20, 20), 128).save(tmp_path / "b.jpg", icc_profile=profile_bytes(SRGB, 1.0))
        assert np.abs(decode_image(media(tmp_path / "b.jpg")).astype(int) - 188).max() <= 2

    def test_srgb_under_any_name_moves_nothing(self, tmp_path):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        Image.fromarray(noise_image(40, 40)).save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_array_equal(decode_image(media(tmp_path / "a.png")), noise_image(40, 40))

    def test_profiles_that_do_not_fit_are_ignored(self, tmp_path):
        good = profile_bytes(ADOBE, 2.2)
        for profile in (b"junk" * 50, good[:200], good[:300], profile_bytes({}, 1.0, b"GRAY")):
            for name in ("a.png", "a.jpg"):
                Image.new("RGB", (20, 20), (50, 60, 70)).save(tmp_path / name, icc_profile=profile)
                assert np.abs(decode_image(media(tmp_path / name)).astype(int) - (50, 60, 70)).max() <= 2

    def test_lab(self, tmp_path):
        """L* 53.2, a* 80, b* 67 is sRGB's red; L* 100 white."""
        for lab, expected in (((136, 128 + 80, 128 + 67), (255, 0, 0)), ((255, 128, 128), (255, 255, 255))):
            Image.new("LAB", (20, 20), lab).save(tmp_path / "a.tif")
            assert np.abs(decode_image(media(tmp_path / "a.tif")).astype(int) - expected).max() <= 12

    def test_inks_of_a_jpeg(self, tmp_path):
        """With Adobe's mark the inks are stored inverted; without ink it is white."""
        for color, expected in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))):
            Image.new("CMYK", (20, 20), color).save(tmp_path / "a.jpg", quality=100)
            assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
            assert np.abs(decode_image(media(tmp_path / "a.jpg")).astype(int) - expected).max() <= 3


class TestPng:
    def test_texts_of_any_size_are_passed_over(self, tmp_path):
        notes = PngInfo()
        notes.add_text("workflow", "{}" * (1 << 20), zip=True)
        notes.add_itxt("prompt", "a" * (3 << 20), zip=True)
        notes.add_text("plain", "b" * (2 << 20))
        Image.fromarray(noise_image(20, 30)).save(tmp_path / "a.png", pnginfo=notes)
        bomb = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(1 << 26)))
        (tmp_path / "b.png").write_bytes(png_bytes(noise_image(20, 30), bomb, after=bomb))
        for name in ("a.png", "b.png"):
            assert probe_image(media(tmp_path / name)) == (20, 30)
            np.testing.assert_array_equal(decode_image(media(tmp_path / name)), noise_image(20, 30))

    def test_large_profiles(self, tmp_path):
        padded = profile_bytes(ADOBE, 2.2) + bytes(2 << 20)
        padded = struct.pack(">I", len(padded)) + padded[4:]
        bomb = zlib.compress(bytes(1 << 26))
        for packed, changes in ((zlib.compress(padded), True), (bomb, False), (b"no zlib", False)):
            data = png_bytes(np.full((20, 20, 3), COLOR, np.uint8), chunk(b"iCCP", b"a\x00\x00" + packed))
            found = pixels_of(tmp_path / "a.png", data)
            assert (np.abs(found[0, 0] - COLOR).max() > 5) == changes

    def test_cut_anywhere(self, tmp_path):
        whole = png_bytes(noise_image(40, 40), chunk(b"tEXt", b"a\x00" + b"b" * 100))
        for size in (9, 20, 40, 100, 200, len(whole) // 2, len(whole) - 40):
            (tmp_path / "a.png").write_bytes(whole[:size])
            with pytest.raises(SampleError, match=r"a\.png is not a readable image"):
                decode_image(media(tmp_path / "a.png"))

    def test_many_chunks(self, tmp_path, monkeypatch):
        monkeypatch.setattr("data_pipelines.media.pixels._MAX_CHUNKS", 50)
        (tmp_path / "a.png").write_bytes(png_bytes(noise_image(20, 30), chunk(b"tEXt", b"a\x00b") * 60))
        with pytest.raises(SampleError, match="more than 50 chunks"):
            probe_image(media(tmp_path / "a.png"))
