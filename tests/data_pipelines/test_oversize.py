"""Documents beyond a budget: split between turns, videos with fewer frames, what is left skipped and counted."""

import json
from collections import Counter

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, ConfigError, DataConfig, SourceConfig, tiny
from data_pipelines.document import Document
from data_pipelines.pipeline import open_pipeline
from data_pipelines.prompts import Picture, Sound, Text, parse_prompt
from data_pipelines.turns import cut_turns, document_elements
from tests.data_pipelines.conftest import store_codes
from tests.data_pipelines.small_media import write_image, write_sound, write_video

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
    write_sound(root / "s.wav", 0.5)
    write_video(root / "v.mp4", seconds=8)
    return root


def opened(root, texts, policies=BOTH, **budgets):
    name = f"m{abs(hash((tuple(texts), policies, tuple(budgets.items()))))}.jsonl"
    (root / name).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sizes = {"tokens": 999, "patches": 960, "audio_frames": 99, "audio_targets": 99} | budgets
    config = DataConfig(
        root=str(root),
        mixture=(SourceConfig(name="main", manifest=name),),
        rows=1,
        budgets=Budgets(**sizes),
        workers=0,
        oversize=policies,
        max_bad_fraction=1.0,
    )
    return open_pipeline(config, tiny())


def documents(pipeline):
    (index,) = pipeline.indexes
    return [index.document(number) for number in index.numbers()]


def test_turns_are_cut_with_their_media_and_loss():
    head, turns = cut_turns(parse_prompt(LONG))
    assert [element.text for element in head] == [SYSTEM]
    kinds = [[type(element) for element in each if not isinstance(element, Text)] for each in turns]
    assert kinds == [[Picture], [], [Sound], [Picture]]
    for each in turns:
        assert each[0].text.startswith("<C_Q>")
        assert [element.text for element in each if isinstance(element, Text) and element.trainable] == ["yes"]
    assert cut_turns(parse_prompt("no roles"))[1] == []


def test_a_long_conversation_is_split_and_loses_nothing(root):
    whole = opened(root, [LONG, turn("x")])
    lengths = whole.indexes[0].needs(0)
    limit = int(lengths[0]) - 1
    pipeline = opened(root, [LONG, turn("x")], tokens=limit)
    (index,) = pipeline.indexes
    assert (index.usable, pipeline.handled(), pipeline.causes()) == (3, {"split": 1}, {})
    assert list(index.numbers()) == [1, 2, 3]
    pieces = documents(pipeline)[1:]
    assert [piece.turns for piece in pieces] == [(0, 3), (3, 4)]
    assert [piece.where for piece in pieces] == [index.where(2), index.where(3)]
    assert index.where(2).endswith(":1")
    texts = [[element.text for element in document_elements(piece) if isinstance(element, Text)] for piece in pieces]
    assert all(each[0] == SYSTEM for each in texts)
    kept = Counter(text for each in texts for text in each if text != SYSTEM)
    assert kept == Counter(
        text for each in cut_turns(parse_prompt(LONG))[1] for text in [e.text for e in each if isinstance(e, Text)]
    )
    encode = lambda document: whole.processor.encode(document, store)  # noqa: E731
    store = store_codes(whole, root / "codes")
    loss = [encode(document).text_weights.sum() for document in (documents(whole)[0], *pieces)]
    # The end of text is learnt after each answer that ends a document: once more for each further piece.
    assert loss[0] + 1 == sum(loss[1:])
    for number, piece in zip((2, 3), pieces, strict=True):
        found = encode(piece).lengths
        assert found.tokens == index.needs(number)[0] <= limit
        assert list(found.pictures) == index.pictures_of(number)


def test_pieces_come_in_rows_and_from_the_cache(root, monkeypatch):
    first = opened(root, [LONG, turn("x")], patches=24)
    monkeypatch.setattr("data_pipelines.processor.Processor.measure", lambda *_: pytest.fail("measured again"))
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
    frames = whole.indexes[0].pictures_of(0)
    assert len(frames) > 3
    pipeline = opened(root, [text], patches=frames[0] * 3)
    (index,) = pipeline.indexes
    assert pipeline.handled() == {"fewer_frames": 1}
    assert [index.pictures_of(number) for number in index.numbers()] == [frames[:3]]
    encoded = pipeline.processor.encode(documents(pipeline)[0], store_codes(pipeline, root / "codes3"))
    assert list(encoded.lengths.pictures) == frames[:3]


def test_listed_frames_are_spread_evenly():
    text = FRAME.replace("a.png", "0") + "".join(FRAME.replace("a.png", str(n)) for n in range(1, 9)) + "go"
    document = Document("x", "", text, "x:1", {}, max_frames=3)
    kept = [element.reference.path for element in document_elements(document) if isinstance(element, Picture)]
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
        assert index.needs(number)[0] <= 60
    partly, whole = pipeline.skipped
    assert partly.where.endswith(":2")
    assert partly.message.startswith("turn 2 by itself: ")
    assert partly.message.endswith(" tokens exceed the row's 60")
    assert whole.where.endswith(":3")
    alone = opened(root, texts, policies=("fewer_frames",), tokens=60)
    assert (alone.handled(), alone.causes()) == ({"fewer_frames": 1}, {"too_long": 2})


def test_without_a_policy_documents_are_skipped(root):
    pipeline = opened(root, [LONG, turn("x")], policies=(), tokens=40)
    assert (pipeline.handled(), pipeline.causes()) == ({}, {"too_long": 1})
    assert next(pipeline.plan())[0].key == (0, 1)


def test_a_policy_that_there_is_not(root):
    with pytest.raises(ConfigError, match=r"data\.oversize 'cut' is none of split, fewer_frames"):
        opened(root, [LONG], policies=("cut",))
