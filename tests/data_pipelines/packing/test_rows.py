"""Steps are the same with any number of workers and hosts, resume anywhere, and lose nothing unsaid."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from data_pipelines.packing.rows import RowShard
from data_pipelines.pipeline import open_pipeline
from tests.data_pipelines.conftest import BUDGETS, store_codes, with_config
from tests.helpers.small_media import write_audio, write_image

IMAGE = '<img_start_baichuan>{"local": "%s"}<img_end_baichuan><trainable_start>the cat<trainable_end>'
SPOKEN = 'hi<trainable_start><audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan><trainable_end>'


def read(pipeline, codes, count=None, **options):
    """The first steps; the reader is closed, which ends its workers."""
    steps = pipeline.steps(codes, **options)
    try:
        return list(islice(steps, count))
    finally:
        steps.close()


def assert_same(steps, others):
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        assert step.state == other.state
        assert step.failed == other.failed
        assert_same_batch(step.batch, other.batch)


def assert_same_batch(batch, other):
    assert batch.keys() == other.keys()
    for name, values in batch.items():
        assert values.dtype == other[name].dtype
        np.testing.assert_array_equal(values, other[name], err_msg=name)


@pytest.fixture(scope="module")
def alone(sample_pipeline, sample_codes):
    """Six steps of four rows, read by one process."""
    return read(with_config(sample_pipeline, rows=4), sample_codes, 6)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_workers_change_nothing(workers, sample_pipeline, sample_codes, alone):
    steps = read(with_config(sample_pipeline, rows=4, workers=workers), sample_codes, 6)
    assert_same(steps, alone)
    assert not any(step.failed for step in steps)


@pytest.mark.parametrize("hosts", [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0,), (1, 2, 3)]], ids=str)
def test_hosts_share_the_rows_of_one_global_order(hosts, sample_pipeline, sample_codes, alone):
    pipeline = with_config(sample_pipeline, rows=4)
    shards = [read(pipeline, sample_codes, 4, shard=RowShard(rows)) for rows in hosts]
    for whole, *parts in zip(alone, *shards, strict=False):
        for rows, part in zip(hosts, parts, strict=True):
            assert_same_batch(part.batch, {name: values[list(rows)] for name, values in whole.batch.items()})
            assert part.state == whole.state


@pytest.mark.parametrize("done", [1, 3])
def test_a_restored_run_goes_on_with_the_same_steps(done, sample_pipeline, sample_codes, alone):
    state = json.loads(json.dumps(alone[done - 1].state))
    pipeline = with_config(sample_pipeline, rows=4)
    assert_same(read(pipeline, sample_codes, 6 - done, state=state), alone[done:])


def test_a_run_resumes_with_other_workers_and_hosts(sample_pipeline, sample_codes, alone):
    pipeline = with_config(sample_pipeline, rows=4, workers=2)
    steps = read(pipeline, sample_codes, 3, state=alone[2].state, shard=RowShard((2, 3)))
    for step, whole in zip(steps, alone[3:], strict=True):
        assert_same_batch(step.batch, {name: values[2:] for name, values in whole.batch.items()})
        assert step.state == whole.state


def test_other_rows_a_step_are_the_same_rows(sample_pipeline, sample_codes, alone):
    for step, other in zip(read(sample_pipeline, sample_codes, 4), range(4), strict=True):
        half = slice(2) if other % 2 == 0 else slice(2, 4)
        assert_same_batch(step.batch, {name: values[half] for name, values in alone[other // 2].batch.items()})


@pytest.mark.slow
def test_every_document_is_in_one_row_or_skipped(sample_root, sample_pipeline, sample_codes):
    """Short rows: long documents are skipped, all others are in one epoch's rows exactly once."""
    budgets = Budgets(tokens=160, patches=600, audio_frames=96, audio_targets=64)
    indexes = tuple(index.within(budgets) for index in sample_pipeline.indexes)
    pipeline = with_config(replace(sample_pipeline, indexes=indexes), rows=8, budgets=budgets)
    assert pipeline.causes()["too_long"] > 5
    found = Counter()
    for step in read(pipeline, sample_codes, epochs=1):
        assert not step.failed
        batch = step.batch
        firsts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
        found.update(zip(batch["source_ids"][firsts].tolist(), batch["document_ids"][firsts].tolist(), strict=True))
    assert found == Counter((source, n) for source, index in enumerate(indexes) for n in index.numbers())
    for index in indexes:
        named = [index.location(n) for n in index.numbers()] + [item.location for item in index.skipped]
        with open(sample_root / index.manifest, "rb") as manifest:
            assert len(named) == len(set(named)) == index.documents == sum(1 for _ in manifest)


@pytest.fixture
def small(tmp_path):
    """Five documents of which media will vanish, and their codes."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / name, 56, 84)
    write_audio(tmp_path / "s.wav", 0.25)
    texts = [IMAGE % "a.png", IMAGE % "b.png", IMAGE % "c.png", SPOKEN, "<trainable_start>the mat<trainable_end>"]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(
        root=str(tmp_path),
        mixture=(SourceConfig(name="main", manifest="m.jsonl"),),
        rows=1,
        budgets=Budgets(tokens=128, patches=128, audio_frames=16, audio_targets=16),
        workers=0,
    )
    pipeline = open_pipeline(config, tiny())
    return pipeline, store_codes(pipeline, tmp_path / "codes")


@pytest.mark.parametrize("workers", [0, 1])
def test_documents_that_fail_at_decode_leave_padding_and_are_told(small, tmp_path, workers):
    pipeline, codes = small
    ((whole,), budget) = read(pipeline, codes, epochs=1), pipeline.config.budgets.tokens
    (tmp_path / "b.png").unlink()
    write_image(tmp_path / "c.png", 112, 84)
    write_audio(tmp_path / "s.wav", 0.3)
    (step,) = read(with_config(pipeline, workers=workers), codes, epochs=1)
    assert {key: (where, cause) for key, (where, cause, _) in step.failed.items()} == {
        (0, 1): ("m.jsonl:2", "missing_file"),
        (0, 2): ("m.jsonl:3", "changed"),
        (0, 3): ("m.jsonl:4", "no_codes"),
    }
    assert "b.png does not exist" in step.failed[0, 1][2]
    assert "s.wav: window 0 has no codes" in step.failed[0, 3][2]
    assert step.state == whole.state
    gone = np.isin(whole.batch["document_ids"], [1, 2, 3])
    assert not step.batch["segment_ids"][gone].any()
    assert not step.batch["tokens"][gone].any()
    kept = ~gone
    np.testing.assert_array_equal(step.batch["tokens"][kept], whole.batch["tokens"][kept])
    np.testing.assert_array_equal(step.batch["positions"][kept], whole.batch["positions"][kept])
    # What is left keeps its place among the images, too.
    shown, left = (np.flatnonzero(found.batch["visual_index"] < budget) for found in (whole, step))
    np.testing.assert_array_equal(left, [i for i in shown if not gone[0, whole.batch["visual_index"][0, i]]])
    patches = (4 * left[:, None] + np.arange(4)).ravel()
    np.testing.assert_array_equal(step.batch["patches"][0, patches], whole.batch["patches"][0, patches])
    np.testing.assert_array_equal(np.flatnonzero(step.batch["patch_segments"]), patches)
    assert (step.batch["audio_index"] == budget).all()
    assert np.count_nonzero(step.batch["visual_index"] < budget) == 6


def test_what_is_lost_changes_no_dealt_order(small, tmp_path):
    """Two hosts may share a row: both must order it alike, also when only one of them could read a document."""
    pipeline, codes = small
    pipeline = with_config(pipeline, context_block=8)
    ((whole,), (straight,)) = (read(pipeline, codes, epochs=1, context_shards=n) for n in (4, 1))
    (tmp_path / "b.png").unlink()
    (step,) = read(pipeline, codes, epochs=1, context_shards=4)
    assert set(step.failed) == {(0, 1)}
    kept = whole.batch["document_ids"] != 1
    assert 0 < kept.sum() < kept.size
    assert not step.batch["segment_ids"][~kept].any()
    for name in ("tokens", "positions", "document_ids"):
        np.testing.assert_array_equal(step.batch[name][kept], whole.batch[name][kept])
    assert (whole.batch["document_ids"] != straight.batch["document_ids"]).any()


def test_images_lie_whole_in_parts(sample_pipeline, sample_codes):
    """The same rows with one part and with eight: each visual token has its patches, each image is in one part."""
    eight = with_config(sample_pipeline, media_shards=8)
    rows = [[item.key for item in row] for row in islice(eight.plan(), 3)]
    (whole, _), (parted, lost) = (pipeline.decoder(sample_codes)(rows) for pipeline in (sample_pipeline, eight))
    assert not lost
    moved = ("patches", "patch_grid", "patch_segments", "visual_index")
    assert_same_batch(*({k: v for k, v in batch.items() if k not in moved} for batch in (whole, parted)))
    t, p = BUDGETS.tokens, BUDGETS.patches
    for row in range(3):
        by_slot, shown = [], []
        for batch in (whole, parted):
            index = batch["visual_index"][row]
            order = np.argsort(index, kind="stable")[: (index < t).sum()]
            patches = (4 * order[:, None] + np.arange(4)).ravel()
            shown.append(patches)
            by_slot.append((index[order], *(batch[name][row][patches] for name in moved[:3])))
        for one, other in zip(*by_slot, strict=True):
            np.testing.assert_array_equal(one, other)
        segments = parted["patch_segments"][row]
        np.testing.assert_array_equal(np.flatnonzero(segments), np.sort(shown[1]))
        for image in range(1, segments.max() + 1):
            assert len(set(np.flatnonzero(segments == image) // (p // 8))) == 1
    assert (parted["patches"] != whole["patches"]).any(), "padding between parts"


def test_images_that_changed_places(tmp_path):
    """Two images of other sizes, as many patches as before: their places in the row no longer fit them."""
    write_image(tmp_path / "a.png", 56, 84)
    write_image(tmp_path / "b.png", 112, 84)
    pair = (IMAGE % "a.png").removesuffix("<trainable_start>the cat<trainable_end>") + IMAGE % "b.png"
    (tmp_path / "m.jsonl").write_text(json.dumps({"text": pair}))
    budgets = Budgets(tokens=128, patches=128, audio_frames=16, audio_targets=16)
    mixture = (SourceConfig(name="main", manifest="m.jsonl"),)
    config = DataConfig(root=str(tmp_path), mixture=mixture, rows=1, budgets=budgets, workers=0, media_shards=2)
    pipeline = open_pipeline(config, tiny())
    codes = store_codes(pipeline, tmp_path / "codes")
    write_image(tmp_path / "a.png", 112, 84)
    write_image(tmp_path / "b.png", 56, 84)
    (step,) = read(pipeline, codes, epochs=1)
    assert step.failed[0, 0][1:] == ("changed", "the document is not what the index measured")


def test_a_budget_of_nothing(small):
    """A run on text alone gives its media no room; workers send empty arrays as well."""
    pipeline, codes = small
    budgets = Budgets(tokens=32, patches=0, audio_frames=0, audio_targets=0)
    indexes = tuple(index.within(budgets) for index in pipeline.indexes)
    narrow = with_config(replace(pipeline, indexes=indexes), budgets=budgets)
    ((alone,), (sent,)) = (read(with_config(narrow, workers=n), codes, epochs=1) for n in (0, 1))
    assert alone.batch["patches"].shape == (1, 0, 588)
    assert_same_batch(alone.batch, sent.batch)
