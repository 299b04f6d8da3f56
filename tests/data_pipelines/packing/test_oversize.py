"""Documents beyond a budget: split between turns, videos with fewer frames, chunks; the rest skipped and counted."""

import json
from collections import Counter

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, RunConfig, SourceConfig, apply_overrides, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompts import AudioElement, ImageElement, TextElement, parse_prompt
from data_pipelines.documents.sequence import cut_turns, document_elements
from data_pipelines.packing.row_limits import TEXT_TARGETS
from data_pipelines.pipeline import open_pipeline
from tests.data_pipelines.conftest import store_codes
from tests.helpers.small_media import write_audio, write_image, write_video

BOTH = ("split", "fewer_frames")
SYSTEM = "<B_SYS>be kind"
HEARD = '<audio_start_baichuan>{"path": "s.wav"}<audio_end_baichuan>'
IMAGE = '<img_start_baichuan>{"local": "a.png"}<img_end_baichuan>'
VIDEO = '<video_start_baichuan>{"local": "v.mp4"}<video_end_baichuan>'
FRAME = '<videoframe_start_omni>{"local": "a.png"}<videoframe_end_omni>'


def turn(words, answer="yes", media=""):
    return f"<C_Q>{media}{words}<C_A><trainable_start>{answer}<trainable_end>"


LONG = SYSTEM + turn("a b c", media=IMAGE) + turn("d e f") + turn("g h i", media=HEARD) + turn("j k l", media=IMAGE)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("long")
    write_image(root / "a.png", 56, 84)  # 24 patches, 6 tokens
    write_audio(root / "s.wav", 0.5)
    write_video(root / "v.mp4", seconds=8)
    return root


def opened(root, texts, policies=BOTH, own=None, **budgets):
    """A pipeline over these documents; `own` are the source's policies, `policies` None the default ones."""
    name = f"m{abs(hash((tuple(texts), policies, tuple(budgets.items()))))}.jsonl"
    (root / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sizes = {"tokens": 999, "patches": 960, "audio_frames": 99, "audio_targets": 99} | budgets
    config = DataConfig(
        root=str(root),
        mixture=(SourceConfig(name="main", manifest=name, oversize=own),),
        rows=1,
        budgets=Budgets(**sizes),
        workers=0,
        **({} if policies is None else {"oversize": policies}),
        max_bad_fraction=1.0,
    )
    return open_pipeline(config, tiny())


def documents(pipeline):
    (index,) = pipeline.indexes
    return [index.document(number) for number in index.numbers()]


def test_turns_are_cut_with_their_media_and_loss():
    head, turns = cut_turns(parse_prompt(LONG))
    assert [element.text for element in head] == [SYSTEM]
    kinds = [[type(element) for element in each if not isinstance(element, TextElement)] for each in turns]
    assert kinds == [[ImageElement], [], [AudioElement], [ImageElement]]
    for each in turns:
        assert each[0].text.startswith("<C_Q>")
        assert [element.text for element in each if isinstance(element, TextElement) and element.trainable] == ["yes"]
    assert cut_turns(parse_prompt("no roles"))[1] == []


def test_a_long_conversation_is_split_and_loses_nothing(root):
    whole = opened(root, [LONG, turn("x")])
    lengths = whole.indexes[0].lengths(0)
    limit = int(lengths[0]) - 1
    pipeline = opened(root, [LONG, turn("x")], tokens=limit)
    (index,) = pipeline.indexes
    assert (index.usable, pipeline.handled(), pipeline.causes()) == (3, {"split": 1}, {})
    assert list(index.numbers()) == [1, 2, 3]
    pieces = documents(pipeline)[1:]
    assert [piece.turns for piece in pieces] == [(0, 3), (3, 4)]
    assert [piece.location for piece in pieces] == [index.location(2), index.location(3)]
    assert index.location(2).endswith(":1")
    texts = [
        [element.text for element in document_elements(piece) if isinstance(element, TextElement)] for piece in pieces
    ]
    assert all(each[0] == SYSTEM for each in texts)
    kept = Counter(text for each in texts for text in each if text != SYSTEM)
    assert kept == Counter(
        text
        for each in cut_turns(parse_prompt(LONG))[1]
        for text in [e.text for e in each if isinstance(e, TextElement)]
    )
    encode = lambda document: whole.processor.encode(document, store)  # noqa: E731
    store = store_codes(whole, root / "codes")
    loss = [encode(document).text_weights.sum() for document in (documents(whole)[0], *pieces)]
    # The end of text is learned after each answer that ends a document: once more for each further piece.
    assert loss[0] + 1 == sum(loss[1:])
    for number, piece in zip((2, 3), pieces, strict=True):
        found = encode(piece).lengths
        assert found.tokens == index.lengths(number)[0] <= limit
        assert list(found.image_patches) == index.image_patches(number)


def test_pieces_come_in_rows_and_from_the_cache(root, monkeypatch):
    first = opened(root, [LONG, turn("x")], patches=24)
    monkeypatch.setattr(
        "data_pipelines.documents.processor.Processor.measure", lambda *_: pytest.fail("measured again")
    )
    again = opened(root, [LONG, turn("x")], patches=24)
    assert first.fingerprint() == again.fingerprint()
    rows = [[item.key for item in row] for row in again.plan(epochs=1)]
    assert Counter(key for row in rows for key in row) == Counter((0, number) for number in again.indexes[0].numbers())
    batch, lost = again.decoder(store_codes(again, root / "codes2"))(rows)
    assert not lost
    assert set(np.unique(batch["document_ids"]).tolist()) == {-1, 1, 2, 3}


def test_a_video_has_as_many_frames_as_fit(root):
    text = f"{VIDEO}what?<trainable_start>red<trainable_end>"
    whole = opened(root, [text])
    frames = whole.indexes[0].image_patches(0)
    assert len(frames) > 3
    pipeline = opened(root, [text], patches=frames[0] * 3)
    (index,) = pipeline.indexes
    assert pipeline.handled() == {"fewer_frames": 1}
    assert [index.image_patches(number) for number in index.numbers()] == [frames[:3]]
    encoded = pipeline.processor.encode(documents(pipeline)[0], store_codes(pipeline, root / "codes3"))
    assert list(encoded.lengths.image_patches) == frames[:3]


def test_listed_frames_are_spread_evenly():
    text = FRAME.replace("a.png", "0") + "".join(FRAME.replace("a.png", str(n)) for n in range(1, 9)) + "go"
    document = Document("x", "", text, "x:1", {}, max_frames=3)
    kept = [element.reference.path for element in document_elements(document) if isinstance(element, ImageElement)]
    assert kept == ["0", "3", "6"]  # int(i * 9 / 3)


def test_policies_are_tried_in_order_and_the_rest_is_skipped(root):
    """One turn too long by itself but for its video; one that nothing helps; a document without turns."""
    video, words = turn("see", media=VIDEO), turn("w " * 80)
    texts = [
        SYSTEM + turn("x") + video,
        SYSTEM + turn("x") + words + turn("y"),
        "z " * 90 + "<trainable_start>a<trainable_end>",
    ]
    pipeline = opened(root, texts, tokens=60)
    (index,) = pipeline.indexes
    assert pipeline.handled() == {"split": 2, "fewer_frames": 1}
    assert pipeline.causes() == {"too_long": 2}
    assert [piece.turns for piece in documents(pipeline)] == [(0, 1), (1, 2), (0, 1), (2, 3)]
    assert [piece.max_frames > 0 for piece in documents(pipeline)] == [False, True, False, False]
    for number in index.numbers():
        assert index.lengths(number)[0] <= 60
    partly, whole = pipeline.skipped
    assert partly.location.endswith(":2")
    assert partly.message.startswith("turn 2 by itself: ")
    assert partly.message.endswith(" tokens exceed the row's 60")
    assert whole.location.endswith(":3")
    alone = opened(root, texts, policies=("fewer_frames",), tokens=60)
    assert (alone.handled(), alone.causes()) == ({"fewer_frames": 1}, {"too_long": 2})


def test_without_a_policy_documents_are_skipped(root):
    pipeline = opened(root, [LONG, turn("x")], policies=(), tokens=40)
    assert (pipeline.handled(), pipeline.causes()) == ({}, {"too_long": 1})
    assert next(pipeline.plan())[0].key == (0, 1)


BOOK = "the cat sat on the mat " * 40 + "猫坐在垫子上。" * 20
WORDS = "see " * 30


def learned(pipeline, path):
    """Text targets of all documents and pieces; each one's arrays are as long as measured."""
    (index,), total = pipeline.indexes, 0
    store = store_codes(pipeline, path)
    for number in index.numbers():
        encoded = pipeline.processor.encode(index.document(number), store)
        assert len(encoded.tokens) == index.lengths(number)[0]
        assert np.count_nonzero(encoded.text_weights) == index.lengths(number)[TEXT_TARGETS]
        total += index.lengths(number)[TEXT_TARGETS]
    return total


@pytest.mark.parametrize("text", [BOOK, f"once{turn('x', BOOK)}"], ids=["unmarked", "marked"])
def test_long_text_is_chunked_by_default(root, text, tmp_path):
    """Nothing is skipped, all is learned, rows are full, and a plan that stops among the chunks goes on."""
    whole, pipeline = opened(root, [text], policies=None), opened(root, [text], policies=None, tokens=32)
    (index,) = pipeline.indexes
    assert (pipeline.handled(), pipeline.causes()) == ({"chunk_text": 1}, {})
    assert learned(whole, tmp_path / "whole") == learned(pipeline, tmp_path / "chunks")
    sizes = [int(index.lengths(number)[0]) for number in index.numbers()]
    assert sizes[:-1] == [32] * (len(sizes) - 1)
    plan = pipeline.step_plan()
    first = [next(plan) for _ in range(5)]
    again = pipeline.step_plan()
    again.restore(json.loads(json.dumps(plan.state)))
    assert [next(plan) for _ in range(5)] == [next(again) for _ in range(5)]
    batch, lost = pipeline.decoder(store_codes(pipeline, tmp_path / "rows"))([row for step in first for row in step])
    assert not lost
    assert (batch["positions"][0] == np.arange(32)).all()


def test_media_are_chunked_where_it_is_asked_for(root, tmp_path):
    """Interleaved documents are cut before an image, in a source's own policies too; by default they are skipped."""
    text = IMAGE + WORDS + IMAGE + WORDS
    skipped = opened(root, [text, turn("x")], policies=None, tokens=60)
    assert skipped.causes() == {"too_long": 1}
    whole = opened(root, [text, turn("x")], tokens=999)
    for pipeline in (
        opened(root, [text, turn("x")], ("chunk",), tokens=60),
        opened(root, [text, turn("x")], None, ("chunk",), tokens=60),
    ):
        (index,) = pipeline.indexes
        assert (pipeline.handled(), pipeline.causes()) == ({"chunk": 1}, {})
        assert [index.image_patches(number) for number in index.numbers()] == [[], [24], [24]]
        assert learned(pipeline, tmp_path / str(id(pipeline))) == learned(whole, tmp_path / f"whole-{id(pipeline)}")


def test_a_medium_that_no_row_holds_gets_fewer_frames_or_is_named(root):
    text = BOOK + VIDEO + "what? red"
    frames = opened(root, [VIDEO + "a"]).indexes[0].image_patches(0)
    both = opened(root, [text], ("chunk", "fewer_frames"), tokens=64, patches=frames[0] * 2)
    assert (both.handled(), both.causes()) == ({"chunk": 1, "fewer_frames": 1}, {})
    assert [len(both.indexes[0].image_patches(number)) for number in both.indexes[0].numbers()][-1] == 2
    alone = opened(root, [text], ("chunk",), tokens=64, patches=frames[0] * 2)
    (left,) = alone.skipped
    assert "the medium at its token" in left.message
    assert left.message.endswith("tokens exceed the row's 64")


def test_turns_too_long_for_a_row_are_chunked_after_a_split(root):
    pipeline = opened(root, [SYSTEM + turn("x") + turn("y", BOOK)], ("split", "chunk_text"), tokens=48)
    assert (pipeline.handled(), pipeline.causes()) == ({"split": 1, "chunk_text": 1}, {})
    spans = [piece.span for piece in documents(pipeline)]
    assert spans[:2] == [None, (0, 48)]
    assert all(piece.turns == (1, 2) for piece in documents(pipeline)[1:])


def test_a_policy_that_there_is_not(root):
    config = DataConfig(root=str(root), mixture=(SourceConfig(name="main", manifest="m.jsonl"),))
    object.__setattr__(config, "oversize", ("cut",))
    with pytest.raises(ConfigError, match=r"data\.oversize 'cut' is none of split, fewer_frames"):
        open_pipeline(config, tiny())
    with pytest.raises(ConfigError, match=r"data\.oversize\[0\] must be one of split, fewer_frames, chunk, chunk_text"):
        apply_overrides(RunConfig(name="x"), ["data.oversize=['cut']"])
