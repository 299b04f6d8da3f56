"""Source prompts: every tag of the released form, and what is refused."""

import json

import pytest

from data_pipelines.documents.prompts import (
    AudioElement,
    ImageElement,
    TextElement,
    VideoElement,
    parse_prompt,
    replace_references,
)
from data_pipelines.errors import SampleError
from data_pipelines.media.location import MediaReference
from data_pipelines.tokenizers.tokenizer import MODEL_TOKENS, SPECIAL_TOKENS
from tests.helpers.golden import golden_path

IMAGE = '<img_start_baichuan>{"local": "a.png"}<img_end_baichuan>'
FRAME = '<videoframe_start_omni>{"path": "f.png"}<videoframe_end_omni>'


def test_special_tokens_are_the_released_names_in_id_order():
    released = json.loads(golden_path("processor/added_tokens.json").read_text())["added_tokens"]
    assert tuple(sorted(released, key=released.get)) == SPECIAL_TOKENS
    assert set(MODEL_TOKENS.values()) <= set(SPECIAL_TOKENS)


def test_text_and_trainable_marks():
    prompt = "<C_Q>Hi.<C_A><trainable_start>Hello<|endoftext|><trainable_end>"
    assert parse_prompt(prompt) == [TextElement("<C_Q>Hi.<C_A>"), TextElement("Hello<|endoftext|>", trainable=True)]
    assert parse_prompt("") == []


def test_every_kind_of_media():
    prompt = (
        f'{IMAGE}<img_start_baichuan>{{"base64": "AAAA", "width": 3}}<img_end_baichuan>'
        '<audio_start_baichuan> {"path": "x/a.wav"}\n<audio_end_baichuan>'
        '<video_start_baichuan>{"local": "v.mp4"}<video_end_baichuan>'
        '<trainable_start>so<audiogen_start_baichuan>{"path": "b.wav"}<audiogen_end_baichuan><trainable_end>'
    )
    assert parse_prompt(prompt) == [
        ImageElement(MediaReference(path="a.png")),
        ImageElement(MediaReference(base64="AAAA")),
        AudioElement(MediaReference(path="x/a.wav")),
        VideoElement(MediaReference(path="v.mp4")),
        TextElement("so", trainable=True),
        AudioElement(MediaReference(path="b.wav"), spoken=True, trainable=True),
    ]


def test_a_list_of_frames_drops_the_marks_around_it():
    frame = ImageElement(MediaReference(path="f.png"), frame=True)
    listed = f"<video_start_baichuan>{FRAME}\n{FRAME}<video_end_baichuan>then"
    assert parse_prompt(listed) == [frame, frame, TextElement("then")]
    assert parse_prompt(FRAME) == [frame]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<img_start_baichuan>a.png<img_end_baichuan>", "holds no JSON but 'a.png'"),
        ("<img_start_baichuan><img_end_baichuan>", "holds no JSON but ''"),
        ("<img_start_baichuan>{}<img_end_baichuan>", "names no file"),
        ('<img_start_baichuan>["a.png"]<img_end_baichuan>', "names no file"),
        ('<img_start_baichuan>{"path": 3}<img_end_baichuan>', "names no file"),
        ("<img_start_baichuan>" + "[" * 100000 + "<img_end_baichuan>", "holds no JSON"),
        ('<img_start_baichuan>{"local": "a.png"}', "<img_start_baichuan> is never closed"),
        ('<img_start_baichuan>{"local": "a.png"}<audio_end_baichuan>', "instead of <img_end_baichuan>"),
        ("text<img_end_baichuan>", "<img_end_baichuan> without its start"),
        ("text<img_pad_baichuan>", "<img_pad_baichuan> in the text"),
        ("<trainable_start>text", "<trainable_start> is never closed"),
        ("text<trainable_end>", "<trainable_end> without <trainable_start>"),
        ("<trainable_start>a<trainable_start>b<trainable_end>", "<trainable_start> inside another one"),
        (f"<video_start_baichuan>{FRAME}", "<video_start_baichuan> is never closed"),
        (f"<video_start_baichuan>{FRAME}text<video_end_baichuan>", "text between the frames"),
        (f"<video_start_baichuan>{FRAME}{IMAGE}<video_end_baichuan>", "followed by <img_start_baichuan>"),
        ("<video_start_baichuan><video_end_baichuan>", "holds no JSON"),
        ("lone surrogate \ud800", "the prompt is not valid Unicode"),
        (r'<img_start_baichuan>{"local": "\udc80.png"}<img_end_baichuan>', "the name of a file is not valid Unicode"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(SampleError, match=message) as caught:
        parse_prompt(prompt)
    assert caught.value.cause == "bad_prompt"


def test_references_are_replaced_where_they_stand():
    """All else stays byte for byte: white space, other tags, tags that keep their reference."""
    prompt = f'<C_Q><img_start_baichuan>{{"base64": "AAAA"}}<img_end_baichuan> a{IMAGE}<video_start_baichuan> {FRAME}'
    prompt += f" {FRAME.replace('f.png', 'g.png')}<video_end_baichuan><trainable_start>"
    names = {
        MediaReference(base64="AAAA"): MediaReference(path="new"),
        MediaReference(path="g.png"): MediaReference(path="猫"),
    }
    assert replace_references(prompt, lambda reference, _: names.get(reference, reference)) == prompt.replace(
        '{"base64": "AAAA"}', '{"path": "new"}'
    ).replace('{"path": "g.png"}', '{"path": "\\u732b"}')
    assert replace_references(prompt, lambda reference, _: reference) == prompt


def test_references_are_replaced_by_what_they_are_for():
    """A file that is seen and heard may become two."""
    video = '<video_start_baichuan>{"path": "v.mp4"}<video_end_baichuan>'
    heard = '<audio_start_baichuan>{"path": "v.mp4"}<audio_end_baichuan>'
    seen = lambda reference, mark: MediaReference(path="f.mov") if "video" in mark else reference  # noqa: E731
    assert replace_references(video + heard, seen) == video.replace("v.mp4", "f.mov") + heard
