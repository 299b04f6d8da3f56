"""Chunks of long documents: together they train on what the whole document would, each target once."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import Budgets, tiny
from data_pipelines.documents.document import Lengths
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompts import AudioElement, ImageElement, parse_prompt
from data_pipelines.documents.sequence import Ids, group_media
from data_pipelines.media.audio import clip_key
from data_pipelines.media.location import MediaReference
from data_pipelines.packing.oversize import Fitter, cut_chunks
from data_pipelines.packing.row_limits import RowLimits, budget_lengths
from data_pipelines.tokenizers.tokenizer import train_tokenizer
from tests.helpers.small_media import document, media, write_audio, write_image

CONFIG = tiny()
WORDS = ["the cat sat on the mat ", "猫坐在垫子上。", "\n\n", "3.14 ", "<C_Q>who?<C_A>", "🐈 "]
MEDIA = [
    '<img_start_baichuan>{"local": "a.png"}<img_end_baichuan>',  # 24 patches, 8 tokens with its marks
    '<videoframe_start_omni>{"local": "a.png"}<videoframe_end_omni>',
    '<audio_start_baichuan>{"path": "s.wav"}<audio_end_baichuan>',  # 3 code frames, 5 tokens
    '<audiogen_start_baichuan>{"path": "s.wav"}<audiogen_end_baichuan>',  # as many, and 4 to predict
]
BUDGETS = Budgets(tokens=24, patches=72, audio_frames=9, audio_targets=8)


class Codes(dict):
    lookup = dict.__getitem__


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("chunks")
    write_image(root / "a.png", 56, 84)
    write_audio(root / "s.wav", 0.25)
    return root


@pytest.fixture(scope="module")
def codes(root):
    drawn = np.random.default_rng(0).integers(0, 16, (3, CONFIG.audio.levels)).astype(np.int16)
    return Codes({clip_key(media(root / "s.wav"), 0): drawn})


@pytest.fixture(scope="module")
def processor():
    return Processor(CONFIG, train_tokenizer(["the cat sat on the mat"] * 3, 330))


def marked(text, learned):
    return f"<trainable_start>{text}<trainable_end>" if learned else text


STRETCHES = st.tuples(st.lists(st.sampled_from(WORDS + MEDIA), min_size=1, max_size=12).map("".join), st.booleans())


@given(st.lists(STRETCHES, min_size=1, max_size=6), st.booleans(), st.sampled_from([0, 7, 13]))
@settings(max_examples=90)
def test_chunks_are_the_document_cut_between_tokens_and_media(processor, root, codes, stretches, unmarked, targets):
    """Arrays of all chunks, one after the other, are those of the whole; what is left out has nothing to learn."""
    text = "".join(text if unmarked else marked(text, learned) for text, learned in stretches)
    found = document(text, root)
    if not unmarked and not any(learned for _, learned in stretches):
        return
    limits = RowLimits(replace(BUDGETS, text_targets=targets))
    frames = text.count(MEDIA[1] * 4)  # a listed video of four frames is too much for a row
    try:
        fitted = Fitter(("chunk",), processor, limits).fit(found)
        whole = processor.encode(found, codes)
    except Exception as error:
        assert getattr(error, "cause", "") == "no_loss", error  # noqa: PT017
        return
    assert fitted.left == "" or frames
    if frames:
        return
    place = {"tokens": 0, "audio": 0, "patches": 0, "targets": 0}
    weights, audio_weights = 0.0, 0.0
    for part, lengths in fitted.parts:
        chunk = processor.encode(part.cut_from(found), codes)
        assert limits.why_exceeds(budget_lengths(lengths), lengths.image_patches) == ""
        assert chunk.lengths.tokens == lengths.tokens
        assert (chunk.lengths.text_targets, chunk.lengths.image_patches) == (
            lengths.text_targets,
            lengths.image_patches,
        )
        start = find(whole, chunk, place["tokens"])
        skipped = slice(place["tokens"], start)
        assert not whole.text_weights[skipped].any()
        assert not np.isin(whole.audio_target_slots, np.arange(skipped.start, skipped.stop)).any()
        place["tokens"] = start + len(chunk.tokens)
        own = (whole.audio_target_slots >= start) & (whole.audio_target_slots < place["tokens"])
        np.testing.assert_array_equal(chunk.audio_targets, whole.audio_targets[own])
        np.testing.assert_array_equal(chunk.audio_weights, whole.audio_weights[own])
        np.testing.assert_array_equal(chunk.audio_target_slots + start, whole.audio_target_slots[own])
        seen = (whole.visual_slots >= start) & (whole.visual_slots < place["tokens"])
        np.testing.assert_array_equal(chunk.visual_slots + start, whole.visual_slots[seen])
        heard = (whole.audio_slots >= start) & (whole.audio_slots < place["tokens"])
        np.testing.assert_array_equal(chunk.audio_codes, whole.audio_codes[heard])
        weights, audio_weights = weights + chunk.text_weights.sum(), audio_weights + chunk.audio_weights.sum()
    assert weights == whole.text_weights.sum()
    assert audio_weights == whole.audio_weights.sum()
    if unmarked:
        assert place["tokens"] >= len(whole.tokens) - 1, "an end of text alone has nothing to predict"


def find(whole, chunk, start):
    """The first place from `start` on where the whole has the chunk's tokens, targets and weights."""
    names, size = ("tokens", "text_targets", "text_weights"), len(chunk.tokens)
    for place in range(start, len(whole.tokens) - size + 1):
        if all(np.array_equal(getattr(whole, name)[place : place + size], getattr(chunk, name)) for name in names):
            return place
    raise AssertionError("a chunk is no stretch of its document")


def chunks_of(sizes, tokens):
    """Chunks of text (numbers of tokens) and media (negative: so many tokens) in rows of `tokens`."""
    image = lambda: (ImageElement(MediaReference(path="a.png")),)  # noqa: E731
    runs = [Ids([1] * size) if size > 0 else image() for size in sizes]
    lengths = [Lengths(tokens=abs(size)) for size in sizes]
    return cut_chunks(runs, lengths, RowLimits(Budgets(tokens=tokens, patches=0, audio_frames=0, audio_targets=0)))


@pytest.mark.parametrize(
    ("sizes", "chunks", "beyond"),
    [
        ([25], [(0, 10), (10, 20), (20, 25)], []),
        ([3, -6, 6], [(0, 3), (3, 8), (8, 10)], []),  # the docstring's example: cut before the image
        ([3, -2, 2, -2, 4], [(0, 6), (6, 11)], []),  # 3 + 2 + 2, then 2 + 4: before the last medium
        ([3, -2, -2, 5], [(0, 3), (3, 10)], []),  # two images that stand together stay together
        ([-10, 1], [(0, 1), (1, 2)], []),
        ([3, -11, 4, -2], [(0, 3), (8, 9)], [(3, 8)]),  # no row holds the image: out with the text after it
        ([2, -11, 20], [(0, 2), (8, 18), (18, 23)], [(2, 8)]),  # but with half a row of text at most
    ],
)
def test_where_chunks_begin(sizes, chunks, beyond):
    assert chunks_of(sizes, 10) == (chunks, beyond)


def test_frames_of_a_listed_video_are_one_item():
    frame, still, sound = (
        ImageElement(MediaReference(path="f"), frame=True),
        ImageElement(MediaReference(path="p")),
        AudioElement(MediaReference(path="s")),
    )
    runs = group_media([Ids([1, 2]), frame, frame, still, still, frame, sound, Ids([])])
    assert [len(run) for run in runs] == [2, 2, 1, 1, 1, 1]

    # Of two listed videos side by side each may have room in a row where both have none.
    frame = '<videoframe_start_omni>{"local": "a.png"}<videoframe_end_omni>'
    video = f"<video_start_baichuan>{frame * 2}<video_end_baichuan>"
    assert [len(run) for run in group_media(parse_prompt(video + video + frame * 3))] == [2, 2, 3]
