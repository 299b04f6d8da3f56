"""The tokenizing command killed at random moments and started again ends with the same store. Slow."""

import random
import time

import pytest

from data_pipelines.audio_codes.store import CodeStore
from tests.helpers.micro import wait_until
from tests.helpers.proofs import sized
from tests.helpers.tokenized import copy_data, files_of, part_time_of, parts_of, run, start, store_of, without_store

pytestmark = pytest.mark.slow

SEED = 5
KILLS = sized(3, 6)
# Seconds over which the first kills are spread, most of a start; no later than with this many parts.
START_TIME, EARLY = 5.0, 3


@pytest.fixture(scope="module")
def whole(sample_dir, tmp_path_factory):
    """Data whose sound was tokenised at one go, and the compiled programs."""
    folder = tmp_path_factory.mktemp("tokenized")
    root = copy_data(sample_dir, folder / "data")
    assert "all as written" in run(root, folder / "xla", "--verify")
    assert parts_of(root) > 5
    return root, folder / "xla"


def test_kills_cost_nothing_that_was_written(whole, tmp_path):
    """Two kills early, the others while parts are written. Same bytes in the end."""
    root, cache = whole
    other, rng, part_time = without_store(root, tmp_path / "data"), random.Random(SEED), part_time_of(root)
    kept, marks = [], lambda: set((other / ".cache").glob("codes-*/frames/.units/*.json"))
    for kill in range(KILLS):
        with start(other, cache) as process:
            if kill < 2:
                wait_until(process, lambda: len(marks()) >= EARLY, seconds=rng.uniform(0, START_TIME))
            else:
                before = marks()
                assert wait_until(process, lambda before=before: marks() != before)
                time.sleep(rng.uniform(0, part_time))
            process.kill()
        kept.append(len(marks()))
    print(f"parts there after each kill: {kept}")
    assert kept == sorted(kept)
    assert KILLS - 2 <= kept[-1] < parts_of(root)
    out = run(other, cache)
    assert f"tokenizing audio: {kept[-1]} of {parts_of(root)} shards are done already" in out
    assert files_of(other) == files_of(root)


def test_what_is_there_is_not_tokenised_again(whole, tmp_path):
    """A mixture of one source first, then all of them: its codes stay where they are, each window has codes once."""
    root, cache = whole
    other = without_store(root, tmp_path / "data")
    mixture = '[{"name": "omni", "manifest": "omni.jsonl"}]'
    run(other, cache, "--set", f"data.mixture={mixture}")
    first = files_of(other)
    out = run(other, cache, "--verify")
    assert "all as written" in out
    now = files_of(other)
    parts = [name for name in first if name.startswith("frames/c.")]
    assert parts
    assert {name: now[name] for name in parts} == {name: first[name] for name in parts}
    one, two = CodeStore(store_of(root)), CodeStore(store_of(other))
    assert len(one) == len(two)
    assert one.meta["frames"] == two.meta["frames"]
    for record in one.index:
        high, low, window, *_ = record.item()
        key = (f"{high:016x}{low:016x}" + "0" * 32, window)
        assert (one.lookup(key) == two.lookup(key)).all()
    again = run(other, cache)
    assert "tokenizing audio" not in again
    assert files_of(other) == now
