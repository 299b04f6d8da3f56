"""Where media lie in a row: images whole in parts of the patches, windows of audio in mel slots."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from baichuan_omni_jax.config import Budgets, DataConfig, tiny
from baichuan_omni_jax.config.architecture import AudioConfig, PostNetConfig
from baichuan_omni_jax.config.mel_targets import reconstruction_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.omni.batch import BRANCH_FIELDS, abstract_batch
from baichuan_omni_jax.sharding import ShardingRules
from data_pipelines.errors import SampleError
from data_pipelines.media.audio import decode_audio
from data_pipelines.media.features import log_mel, mel_length, mel_target
from data_pipelines.packing.row_limits import MelSlots, PatchLayout, check_media_shards, mel_slots, row_key
from tests.data_pipelines.conftest import BUDGETS, with_config
from tests.helpers.small_media import document

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


AUDIO = AudioConfig()
WAVE = (0.1 * np.random.default_rng(0).standard_normal(60_000)).astype(np.float32)
WINDOWS = replace(BUDGETS, mel_windows=12)


def decode(pipeline, codes, rows):
    decoder = pipeline.decoder(codes)
    batch, lost = decoder(rows, decoder.mel_frames(rows))
    assert not lost
    return batch


@pytest.fixture(scope="module")
def heard(sample_pipeline):
    """The sample mixture with room for mels, and rows of it that hold audio."""
    pipeline = with_config(sample_pipeline, budgets=WINDOWS, rows=3)
    return pipeline, next(pipeline.step_plan())


def test_each_window_is_joined_to_its_codes(heard, sample_codes):
    pipeline, rows = heard
    batch, audio = decode(pipeline, sample_codes, rows), pipeline.omni.audio
    without = decode(with_config(pipeline, budgets=BUDGETS), sample_codes, rows)
    assert {"mel", "mel_lengths", "mel_owner", "mel_audio"} == batch.keys() - without.keys()
    for name, values in without.items():
        np.testing.assert_array_equal(batch[name], values)
    assert batch["mel"].shape == (3, 12, audio.max_mel_frames, audio.num_mel_bins)
    assert batch["mel"].dtype == np.float32
    for row, documents in enumerate(rows):
        owners, covered = [], np.zeros(BUDGETS.audio_frames, int)
        slot = 0
        for segment, (source, number) in enumerate(documents, start=1):
            for item in pipeline.processor.audio_items(pipeline.indexes[source].document(number)):
                wave = decode_audio(item.media, item.samples, audio.sampling_rate)
                expected = log_mel(wave[item.window.start :][: item.window.samples], audio).T
                length, place = batch["mel_lengths"][row, slot], batch["mel_audio"][row, slot]
                np.testing.assert_array_equal(batch["mel"][row, slot, :length], expected)
                assert not batch["mel"][row, slot, length:].any()
                frames = slice(place, place + audio.bridge_length(int(length)))
                np.testing.assert_array_equal(batch["audio_codes"][row, frames], sample_codes.lookup(item.key))
                slots = batch["audio_index"][row, frames]
                assert (batch["segment_ids"][row, slots] == segment).all()
                covered[frames] += 1
                owners.append(segment)
                slot += 1
        assert batch["mel_owner"][row].tolist() == owners + [0] * (12 - slot)
        assert not batch["mel_lengths"][row, slot:].any()
        assert (batch["mel_audio"][row, slot:] == BUDGETS.audio_frames).all()
        np.testing.assert_array_equal(covered, batch["audio_index"][row] < BUDGETS.tokens)


def test_without_codes_only_their_values_are_missing(heard, sample_codes):
    """A tokenizer in the step fills them in: the frame that a slot predicts is that of the slot after it."""
    pipeline, rows = heard
    batch, full = decode(pipeline, None, rows), decode(pipeline, sample_codes, rows)
    for name in batch.keys() - {"audio_codes", "audio_targets"}:
        np.testing.assert_array_equal(batch[name], full[name])
    assert not batch["audio_codes"].any()
    ends = full["audio_targets"][..., 0] == pipeline.omni.audio.codebook_sizes[0]
    np.testing.assert_array_equal(batch["audio_targets"], np.where(ends[..., None], full["audio_targets"], 0))
    for row in range(len(rows)):
        at_slot = np.zeros((BUDGETS.tokens + 2, pipeline.omni.audio.levels), int)
        at_slot[full["audio_index"][row]] = full["audio_codes"][row]
        learned = (full["audio_weights"][row] > 0).all(1)
        targets = at_slot[full["audio_target_index"][row][learned] + 1]
        np.testing.assert_array_equal(targets, full["audio_targets"][row][learned])
    assert (full["audio_weights"] > 0).any(), "no row has anything to say"


def test_a_step_takes_the_smallest_size_that_holds_its_longest_window(heard):
    pipeline, rows = heard
    audio = pipeline.omni.audio
    per_code = audio.stride_size * audio.avg_pooler
    lengths = [
        item.window.mel_frames
        for row in rows
        for source, number in row
        for item in pipeline.processor.audio_items(pipeline.indexes[source].document(number))
    ]
    sizes = (2 * per_code, max(lengths) + 2 * per_code, audio.max_mel_frames)
    assert max(lengths) > sizes[0]
    decoder = with_config(pipeline, mel_frames=sizes).decoder(None)
    assert decoder.mel_frames(rows) >= max(lengths)
    for row in rows:  # of what is measured only, so that all hosts agree
        assert decoder.mel_frames([row]) <= decoder.mel_frames(rows)
    assert with_config(pipeline, budgets=BUDGETS).decoder(None).mel_frames(rows) == 0


def test_a_size_holds_every_window_with_its_code_frames():
    """DocumentLengths are code frames; the longest window that gives as many must fit."""
    slots = MelSlots((*range(8, 3000, 8), 3000), 8, 0)
    for frames in range(1, 3001):
        assert frames <= slots.size(AUDIO.bridge_length(frames)) <= frames + 16


def test_longer_windows_are_cropped_at_whole_code_frames(heard, sample_codes):
    pipeline, rows = heard
    audio = pipeline.omni.audio
    per_code = audio.stride_size * audio.avg_pooler
    size = 3 * per_code
    cropped = with_config(pipeline, mel_frames=(size,))
    batch, whole = decode(cropped, sample_codes, rows), decode(pipeline, sample_codes, rows)
    assert batch["mel"].shape[2] == size
    skipped = (batch["mel_audio"] - whole["mel_audio"])[whole["mel_lengths"] > 0]
    assert len(set(skipped.tolist())) > 3
    for row, slot in zip(*np.nonzero(whole["mel_lengths"]), strict=True):
        start = per_code * (batch["mel_audio"] - whole["mel_audio"])[row, slot]
        length = batch["mel_lengths"][row, slot]
        assert length == min(size, whole["mel_lengths"][row, slot])
        np.testing.assert_array_equal(batch["mel"][row, slot, :length], whole["mel"][row, slot, start : start + length])
    # The same rows give the same crops; the same documents in another row, or another seed, give others.
    np.testing.assert_array_equal(decode(cropped, sample_codes, rows)["mel"], batch["mel"])
    reversed_rows = decode(cropped, sample_codes, [row[::-1] for row in rows])
    other_seed = decode(with_config(cropped, seed=5), sample_codes, rows)
    for other in (reversed_rows, other_seed):
        assert sorted(other["mel_audio"].ravel()) != sorted(batch["mel_audio"].ravel())


@settings(deadline=None, max_examples=30, derandomize=True)
@given(samples=st.integers(1600, 60_000), crop=st.integers(0, 1000), size=st.sampled_from([104, 160, 256]))
def test_targets_of_a_crop_begin_when_it_does(samples, crop, size):
    """Windows of any length, shown whole or in part: frame i of every target is the window's own, i hops after the
    first code frame shown; an exact decoder of what is shown is right at every frame.
    """
    scales = reconstruction_targets(((1024, 256), (400, 160)), PostNetConfig(num_mel_bins=8))
    slots = MelSlots((size,), 8, 0, targets=scales)
    wave = WAVE[:samples]
    shown, skipped = slots.show(np.zeros((mel_length(samples, AUDIO), 1), np.float32), size, (crop,))
    states = 4 * AUDIO.bridge_length(len(shown)) - 1  # at 50 Hz, of what is shown
    for name, found in slots.make_targets({16000: wave}, size, skipped).items():
        settings, whole = scales[name], mel_target(wave, scales[name])
        first = skipped * 1280 // settings.hop  # a code frame is 80 ms
        assert first * settings.hop == skipped * 1280
        np.testing.assert_array_equal(found, whole[first : first + len(found)])
        assert len(found) >= states * 320 // settings.hop  # codes never cover more than there is
        assert len(found) <= slots.target_frames(name, size)


def test_silent_audio_is_lost_under_its_own_cause(tmp_path, sample_pipeline):
    soundfile.write(tmp_path / "s.wav", np.zeros(16000, np.int16), 16000)
    text = '<audio_start_baichuan>{"path": "s.wav"}<audio_end_baichuan><trainable_start>x<trainable_end>'
    processor = sample_pipeline.processor
    assert processor.measure(document(text, tmp_path)).mel_windows == 1
    with pytest.raises(SampleError, match=r"s\.wav is silent") as caught:
        processor.encode(document(text, tmp_path), None, mels=True)
    assert caught.value.cause == "silent_audio"


def test_the_fields_are_those_that_a_step_is_compiled_for(heard):
    pipeline, rows = heard
    mesh = jax.make_mesh((1,) * 4, ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Explicit,) * 4)
    batch = decode(with_config(pipeline, mel_frames=(160,)), None, rows)
    fields = abstract_batch(3, WINDOWS, pipeline.omni, tuple(BRANCH_FIELDS), mesh, ShardingRules(), mel_frames=160)
    assert {name: (v.shape, v.dtype) for name, v in fields.items()} == {k: (v.shape, v.dtype) for k, v in batch.items()}


def test_sizes_that_are_refused():
    for sizes in ((800, 400), (800, 800), (4, 800), (800, 3008)):
        with pytest.raises(ConfigError, match=r"data\.mel_frames .* must ascend from at least 8 to at most 3000"):
            mel_slots(DataConfig(mel_frames=sizes, budgets=Budgets(mel_windows=1)), AUDIO)
    assert mel_slots(DataConfig(), AUDIO).sizes == (3000,)
    assert row_key([(0, 1), (2, 3)]) != row_key([(2, 3), (0, 1)])
