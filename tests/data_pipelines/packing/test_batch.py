"""Packed rows of real sample documents: everything at its place, for every subset of modalities."""

from itertools import combinations

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, tiny
from data_pipelines.documents.prompts import AudioElement, ImageElement, VideoElement, parse_prompt
from data_pipelines.packing.batch import RowWriter, empty_rows

OMNI = tiny()
T = OMNI.tokens
LEVELS = OMNI.audio.levels
BUDGETS = Budgets(tokens=700, patches=1500, audio_frames=400, audio_targets=200)
MODALITIES = ("image", "video", "heard", "spoken")
SUBSETS = [subset for size in range(5) for subset in combinations(MODALITIES, size)]


def modalities(text):
    """What a prompt holds besides text."""
    found = set()
    for element in parse_prompt(text):
        if isinstance(element, AudioElement):
            found.add("spoken" if element.spoken else "heard")
        elif isinstance(element, VideoElement) or (isinstance(element, ImageElement) and element.frame):
            found.add("video")
        elif isinstance(element, ImageElement):
            found.add("image")
    return found


@pytest.fixture(scope="module")
def by_subset(sample_pipeline):
    """{modalities: [(source, number), ...]} of the sample data set."""
    found = {}
    for source, index in enumerate(sample_pipeline.indexes):
        for number in index.numbers():
            subset = modalities(index.document(number).text)
            found.setdefault(frozenset(subset), []).append((source, number))
    return found


def encode(pipeline, codes, keys):
    return [pipeline.processor.encode(pipeline.indexes[source].document(number), codes) for source, number in keys]


def pack(encoded, keys, budgets=BUDGETS):
    batch = empty_rows(1, budgets, OMNI)
    writer = RowWriter(batch, 0)
    for document, (source, number) in zip(encoded, keys, strict=True):
        writer.add(document, source=source, number=number)
    return {name: values[0] for name, values in batch.items()}


def used(slots, length=BUDGETS.tokens):
    """Used slots, which come before the unused ones."""
    count = int((slots < length).sum())
    assert (slots[count:] == length).all()
    return slots[:count]


def check_media(row):
    """Pads and slots coincide exactly, in ascending order; nothing else in the row is a pad."""
    tokens = row["tokens"]
    np.testing.assert_array_equal(np.flatnonzero(tokens == T.audio_pad), used(row["audio_index"]))
    visual = np.flatnonzero(np.isin(tokens, [T.image_pad, T.video_place]))
    np.testing.assert_array_equal(visual, used(row["visual_index"]))
    assert np.count_nonzero(row["patch_segments"]) == 4 * len(visual)
    assert not row["patches"][4 * len(visual) :].any()
    targets = used(row["audio_target_index"])
    assert (row["audio_weights"][: len(targets), 0] == 1).all()
    assert not row["audio_weights"][len(targets) :].any()
    weighted = np.flatnonzero(row["text_weights"])
    np.testing.assert_array_equal(row["text_targets"][weighted], tokens[weighted + 1])
    np.testing.assert_array_equal(row["segment_ids"][weighted], row["segment_ids"][weighted + 1])


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(("text", *subset)))
def test_every_subset_of_modalities(subset, sample_pipeline, sample_codes, by_subset):
    keys = by_subset[frozenset(subset)][:3]
    assert keys, "the sample data set has no such document"
    encoded = encode(sample_pipeline, sample_codes, keys)
    row = pack(encoded, keys)
    check_media(row)
    tokens, length = row["tokens"], sum(len(document.tokens) for document in encoded)
    assert (np.count_nonzero(tokens == T.image_pad) > 0) == ("image" in subset)
    assert (np.count_nonzero(tokens == T.video_place) > 0) == ("video" in subset)
    assert (T.audio_start in tokens[:length]) == ("heard" in subset)
    assert (T.audiogen_start in tokens[:length]) == ("spoken" in subset)
    assert row["text_weights"].sum() > 0
    # All speech of the sample's documents is learned: every frame is predicted, one end frame a clip.
    frames, clips = len(used(row["audio_target_index"])), np.count_nonzero(tokens[:length] == T.audiogen_start)
    assert (frames > 0) == ("spoken" in subset)
    ends = row["audio_targets"][:frames, 0] == OMNI.audio.codebook_sizes[0]
    assert ends.sum() == clips
    assert (row["audio_weights"][:frames].sum(1) == np.where(ends, 1, LEVELS)).all()


@pytest.fixture(scope="module")
def mixed(sample_pipeline, sample_codes, by_subset):
    """A row of one document of each of six subsets, with its keys and encoded documents."""
    chosen = [(), ("image",), ("heard", "spoken"), ("image", "video", "heard", "spoken"), ("spoken",), ("video",)]
    keys = [by_subset[frozenset(subset)][0] for subset in chosen]
    encoded = encode(sample_pipeline, sample_codes, keys)
    return pack(encoded, keys), keys, encoded


def test_each_document_lies_unchanged_at_its_place(mixed):
    row, keys, encoded = mixed
    start = {"tokens": 0, "audio": 0, "targets": 0, "patches": 0, "visual": 0, "frames": 0}
    for segment, (document, (source, number)) in enumerate(zip(encoded, keys, strict=True), start=1):
        at = start["tokens"]
        here = slice(at, at + len(document.tokens))
        np.testing.assert_array_equal(row["tokens"][here], document.tokens)
        np.testing.assert_array_equal(row["text_targets"][here], document.text_targets)
        np.testing.assert_array_equal(row["text_weights"][here], document.text_weights)
        np.testing.assert_array_equal(row["positions"][here], np.arange(len(document.tokens)))
        for name, value in (("segment_ids", segment), ("source_ids", source), ("document_ids", number)):
            assert (row[name][here] == value).all()

        audio = slice(start["audio"], start["audio"] + len(document.audio_codes))
        np.testing.assert_array_equal(row["audio_codes"][audio], document.audio_codes)
        np.testing.assert_array_equal(row["audio_index"][audio], document.audio_slots + at)
        targets = slice(start["targets"], start["targets"] + len(document.audio_targets))
        np.testing.assert_array_equal(row["audio_targets"][targets], document.audio_targets)
        np.testing.assert_array_equal(row["audio_weights"][targets], document.audio_weights)
        np.testing.assert_array_equal(row["audio_target_index"][targets], document.audio_target_slots + at)
        patches = slice(start["patches"], start["patches"] + len(document.patches))
        np.testing.assert_array_equal(row["patches"][patches], document.patches)
        np.testing.assert_array_equal(row["patch_grid"][patches], document.patch_grid)
        np.testing.assert_array_equal(row["patch_segments"][patches], document.patch_frames + start["frames"])
        visual = slice(start["visual"], start["visual"] + len(document.visual_slots))
        np.testing.assert_array_equal(row["visual_index"][visual], document.visual_slots + at)

        start["frames"] += int(document.patch_frames.max(initial=0))
        for name, count in (
            ("tokens", len(document.tokens)),
            ("audio", len(document.audio_codes)),
            ("targets", len(document.audio_targets)),
            ("patches", len(document.patches)),
            ("visual", len(document.visual_slots)),
        ):
            start[name] += count


def test_segments_ascend_and_the_rest_is_padding(mixed):
    row, _, encoded = mixed
    check_media(row)
    length = sum(len(document.tokens) for document in encoded)
    segments = row["segment_ids"]
    assert (np.diff(segments[:length]) >= 0).all()
    assert set(segments[:length]) == set(range(1, len(encoded) + 1))
    for name in ("tokens", "positions", "segment_ids", "text_targets", "text_weights"):
        assert not row[name][length:].any()
    assert (row["document_ids"][length:] == -1).all()
    assert (row["source_ids"][length:] == -1).all()
    frames = row["patch_segments"][row["patch_segments"] > 0]
    assert set(np.diff(frames)) <= {0, 1}, "every image of the row has its own number"


def test_a_row_without_documents():
    row = {name: values[0] for name, values in empty_rows(1, BUDGETS, OMNI).items()}
    check_media({**row, "tokens": np.zeros_like(row["tokens"])})
    assert not row["segment_ids"].any()
    assert row["patches"].dtype == np.uint8
    assert row["visual_index"].shape == (BUDGETS.patches // 4,)


def test_a_lost_document_leaves_padding_in_its_place(mixed):
    _, _, encoded = mixed
    batch = empty_rows(1, BUDGETS, OMNI)
    writer = RowWriter(batch, 0)
    writer.add(encoded[0], source=0, number=1)
    writer.skip(50)
    writer.add(encoded[1], source=0, number=2)
    first = len(encoded[0].tokens)
    assert not batch["segment_ids"][0, first : first + 50].any()
    np.testing.assert_array_equal(batch["tokens"][0, first + 50 :][: len(encoded[1].tokens)], encoded[1].tokens)
    assert batch["segment_ids"][0, first + 50] == 2
    assert batch["visual_index"][0, 0] == encoded[1].visual_slots[0] + first + 50
