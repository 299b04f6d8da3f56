"""Images in a row's parts: whole, apart, in order, and wherever they must fit they do."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import Budgets, DataConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.packing.media_layout import PatchLayout, check_media_shards

SIZES = st.lists(st.integers(1, 10).map(lambda n: 4 * n), max_size=20)


@given(SIZES, st.sampled_from([1, 2, 3, 8]), st.sampled_from([12, 40, 64]))
def test_images_lie_apart_and_whole_in_one_part(sizes, parts, room):
    layout = PatchLayout(parts * room, parts)
    if not layout.fits(sizes):
        with pytest.raises(ValueError, match=f"{len(sizes)} images do not fit {parts} parts of {room} patches"):
            layout.starts(sizes)
        return
    starts = layout.starts(sizes)
    owner = np.full(parts * room, -1)
    for image, (start, size) in enumerate(zip(starts.tolist(), sizes, strict=True)):
        assert start // room == (start + size - 1) // room, "in two parts"
        assert (owner[start : start + size] == -1).all(), "two images in one place"
        owner[start : start + size] = image
    for part in owner.reshape(parts, room):
        used = part[part >= 0]
        assert (np.diff(used) >= 0).all(), "in the order of the row"
        assert (part[len(used) :] == -1).all(), "padding comes last"


@settings(max_examples=50)
@given(SIZES, st.sampled_from([2, 5]))
def test_small_images_always_fit(sizes, parts):
    """What the index relies on: an image finds no part only when all hold more than a part less the largest."""
    largest = max(sizes, default=0)
    assert PatchLayout(parts * largest, parts).fits(sizes) or len(sizes) > parts
    room = -(-sum(sizes) // parts) + largest
    assert PatchLayout(parts * room, parts).fits(sizes)


@settings(max_examples=30)
@given(SIZES)
def test_one_part_has_images_one_after_the_other(sizes):
    layout = PatchLayout(400, 1)
    assert layout.fits(sizes) == (sum(sizes) <= 400)
    if layout.fits(sizes):
        np.testing.assert_array_equal(layout.starts(sizes), np.cumsum([0, *sizes])[:-1])


def test_the_example_of_the_docstring():
    assert PatchLayout(16, 2).starts([3, 6, 5]).tolist() == [8, 0, 11]
    assert not PatchLayout(16, 2).fits([6, 6, 3]), "one of three must be cut"


@pytest.mark.parametrize(
    ("patches", "shards", "message"),
    [
        (64, 0, r"data\.media_shards 0 must be at least 1"),
        (64, 3, r"data\.budgets\.patches 64 is not divisible by data\.media_shards 3 parts"),
        (72, 4, r"72 is not divisible by data\.media_shards 4 parts of whole visual tokens \(4 patches each\)"),
    ],
)
def test_parts_of_whole_visual_tokens(patches, shards, message):
    config = DataConfig(budgets=Budgets(patches=patches), media_shards=shards)
    with pytest.raises(ConfigError, match=message):
        check_media_shards(config, tiny())
    check_media_shards(replace(config, media_shards=2), tiny())
