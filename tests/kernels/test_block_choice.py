"""Blocks are chosen by what they visit, counted as the plan counts it."""

import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.kernels.flash_attention import Segments, plan_blocks
from baichuan_omni_jax.kernels.flash_attention.block_choice import CANDIDATES, _count_visits, choose_blocks
from baichuan_omni_jax.kernels.flash_attention.plan import INTERIOR, unpack

LENGTH = 4096


@pytest.mark.parametrize("blocks", CANDIDATES)
def test_visits_are_those_of_the_plan(blocks):
    random = np.random.default_rng(0)
    for _ in range(4):
        sizes = random.integers(1, 900, 40)
        sizes = sizes[: np.searchsorted(np.cumsum(sizes), LENGTH, "right")].tolist()
        ids = np.zeros(LENGTH, np.int32)
        ids[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        positions = np.concatenate([*(np.arange(size) for size in sizes), np.zeros(LENGTH - sum(sizes))]).astype(int)
        segments = Segments.from_row(jnp.asarray(ids)[None], jnp.asarray(positions, jnp.int32)[None])
        plan = plan_blocks(segments, True, *blocks)
        count = int(plan.count[0, 0])
        interior = int((unpack(plan.by_query[0, 0, :count])[2] & INTERIOR > 0).sum())
        assert _count_visits(sizes, *blocks) == (count, interior)


def test_long_documents_have_large_blocks_and_short_ones_small():
    random = np.random.default_rng(1)
    packed = [random.lognormal(np.log(1000), 0.5, 60).astype(int).tolist() for _ in range(4)]
    assert choose_blocks([[65536]] * 2, 65536)[:2] == (512, 1024)
    assert choose_blocks(packed, 65536)[:2] == (256, 256)
    mixed = choose_blocks([[8000] * 8], 65536)
    assert mixed.visited > 1
    assert mixed.block_q >= 256


def test_without_documents_the_blocks_are_the_usual_ones():
    assert choose_blocks([], 65536)[:2] == choose_blocks([[]], 65536)[:2] == (512, 512)
    assert choose_blocks([[10]], 1000)[:2] == (512, 512)
