"""Predicted times: what binds a step, what hides, where exchanges run, and the masked pairs of attention's blocks."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baichuan_omni_jax.config import Budgets, RunConfig
from baichuan_omni_jax.flops.terms import TPUS
from baichuan_omni_jax.train.preflight import Packing
from baichuan_omni_jax.train.preflight.step_time import PRODUCT_SHARE, Exchange, Work, predict, torus_dims

V5P = TPUS["TPU v5"]
GATHER = Exchange("all-gather", 1e9, 16, 1)


def test_a_step_of_products_alone_runs_at_their_share_of_the_peak():
    time = predict(Work(product_flops=V5P.flops), V5P, V5P.flops / 2)
    assert time.total_s == pytest.approx(1 / PRODUCT_SHARE["v5p"])
    assert (time.hfu, time.mfu) == (pytest.approx(PRODUCT_SHARE["v5p"]), pytest.approx(PRODUCT_SHARE["v5p"] / 2))
    assert time.binds == "products"


def test_what_is_hidden_costs_only_what_outlasts_the_work():
    work = Work(product_flops=V5P.flops, exchanges=[GATHER])
    shown = predict(work, V5P, V5P.flops)
    hidden = predict(replace(work, exchanges=[GATHER._replace(hidden=True)]), V5P, V5P.flops)
    assert shown.exposed_s == pytest.approx(GATHER.seconds(V5P)) == pytest.approx(hidden.hidden_s)
    assert hidden.exposed_s == 0
    long = predict(replace(work, exchanges=[GATHER._replace(hidden=True, bytes=1e13)]), V5P, V5P.flops)
    assert long.exposed_s == pytest.approx(long.hidden_s - long.products_s)
    assert long.binds == "exchanges"


@pytest.mark.parametrize(
    ("changed", "times"),
    [
        ({"kind": "all-reduce"}, 2),  # scattered, then gathered
        ({"dims": 2}, 1 / 2),
        ({"joined": False}, 2),
        ({"bytes": 3e9}, 3),
    ],
)
def test_an_exchange_takes_its_bytes_by_the_links_along_it(changed, times):
    assert GATHER._replace(**changed).seconds(V5P) == pytest.approx(times * GATHER.seconds(V5P))


def mesh_of(shape: tuple[int, ...], topology: tuple[int, ...], kind: str = "TPU v5", slices: int = 1):
    """A mesh (fsdp, context) over devices in the order of their places, slice after slice."""
    places = [(number, place) for number in range(slices) for place in np.ndindex(*topology)]
    devices = np.empty(len(places), object)
    devices[:] = [SimpleNamespace(coords=at, slice_index=number, device_kind=kind) for number, at in places]
    return devices.reshape(shape), ("data", "fsdp", "context")[-len(shape) :]


def test_where_an_exchange_runs():
    mesh = mesh_of((16, 4), (4, 4, 4))
    assert torus_dims(*mesh, ("context",)) == (4, 1, True)
    assert torus_dims(*mesh, ("fsdp",)) == (16, 2, True)
    assert torus_dims(*mesh, ("fsdp", "context")) == (64, 3, True)
    # Eight of sixteen are half of a ring, and eight in a row of a small slice are none.
    assert torus_dims(*mesh_of((32, 8), (16, 16), "TPU v6 lite"), ("context",)) == (8, 1, False)
    assert torus_dims(*mesh_of((4, 8), (4, 8), "TPU v6 lite"), ("context",)) == (8, 1, False)
    assert torus_dims(*mesh_of((16, 16), (16, 16), "TPU v6 lite"), ("context",)) == (16, 1, True)
    assert torus_dims(*mesh_of((2, 16, 4), (4, 4, 4), slices=2), ("data",)) == (2, 0, False)


@given(st.integers(0, 100), st.sampled_from([8, 16, 32]), st.sampled_from([0, 8, 64]))
def test_visited_pairs_are_those_of_blocks_that_share_a_document(seed, block, block_kv):
    packing, run = Packing(mean=40.0, seed=seed), RunConfig(name="x")
    run = replace(
        run,
        data=replace(run.data, rows=1, budgets=Budgets(tokens=128)),
        compute=replace(run.compute, attention_block=block, attention_kv_block=block_kv),
    )
    ids = np.repeat(np.arange(500), (packing._row(np.random.default_rng(seed), 128) + [0] * 500)[:500])
    seen = (ids[:, None] == ids) & np.tri(128, dtype=bool)
    keys = block_kv or block
    blocks = seen.reshape(128 // block, block, 128 // keys, keys).any((1, 3))
    # Blocks are told apart by their first and last documents: a pair that shares one may be masked all the same.
    assert blocks.sum() * block * keys <= packing.visited_pairs(run)
    if keys <= block:
        assert packing.visited_pairs(run) == blocks.sum() * block * keys
