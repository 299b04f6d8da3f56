"""Steps that are not finite: counted, their batches kept, too many in a row end the run with everything saved."""

import json

import numpy as np
import pytest

from baichuan_omni_jax.train.alerts import NonfiniteGuard

BATCH = {
    "tokens": np.arange(8, dtype=np.int32).reshape(1, 8),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 3, 0, 0]], np.int32),
    "source_ids": np.array([[0, 0, 0, 1, 1, 0, -1, -1]], np.int32),
    "document_ids": np.array([[7, 7, 7, 2, 2, 9, -1, -1]], np.int32),
}
BAD, GOOD = {"nonfinite": 1.0, "loss": float("nan")}, {"nonfinite": 0.0, "loss": 1.0}


@pytest.fixture
def guard(tmp_path):
    return NonfiniteGuard(tmp_path, 3, lambda source, number: f"{'ab'[source]}.jsonl:{number}")


def test_a_batch_is_kept_with_the_lines_of_its_documents(guard, tmp_path):
    guard.observe(4, GOOD, BATCH)
    assert not (tmp_path / "nonfinite").exists()
    guard.observe(5, BAD, BATCH)
    folder = tmp_path / "nonfinite" / "step_5"
    with np.load(folder / "host_0.npz") as found:
        assert {name: found[name].tolist() for name in found} == {name: x.tolist() for name, x in BATCH.items()}
    kept = json.loads((folder / "host_0.json").read_text())
    assert kept == {
        "numbers": {"nonfinite": "1.0", "loss": "nan"},
        "documents": ["a.jsonl:7", "a.jsonl:9", "b.jsonl:2"],
    }


def test_only_steps_in_a_row_are_too_many(guard, tmp_path):
    """Bad steps 1 2, a good one, bad ones 4 5 6: the limit of 3 is met at step 6, and a good step 7 is too late."""
    exceeded = []
    for step, numbers in enumerate([BAD, BAD, GOOD, BAD, BAD, BAD, GOOD], 1):
        guard.observe(step, numbers, BATCH)
        exceeded.append(guard.exceeded)
    assert exceeded == [False] * 5 + [True] * 2
    assert guard.count == 5
    assert sorted(path.name for path in (tmp_path / "nonfinite").iterdir()) == ["step_2", "step_4", "step_5", "step_6"]
    assert "not finite in 3 steps in a row (train.nonfinite_limit)" in guard.sentence()
