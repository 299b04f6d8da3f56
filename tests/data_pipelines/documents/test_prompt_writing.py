"""Prompts written from elements are read as these elements again; what a reader sees of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.documents.prompt_writing import plain_text, turn, write_prompt
from data_pipelines.documents.prompts import (
    AudioElement,
    ImageElement,
    TextElement,
    TokensElement,
    VideoElement,
    parse_prompt,
)
from data_pipelines.media.location import MediaReference

REFERENCES = st.builds(MediaReference, path=st.sampled_from(["a.png", "目录/“b”.wav"])) | st.just(
    MediaReference(base64="AAAA")
)
MEDIA = st.one_of(
    st.builds(ImageElement, REFERENCES, st.booleans()),
    st.builds(VideoElement, REFERENCES),
    st.builds(lambda reference: AudioElement(reference), REFERENCES),
    st.builds(lambda reference, learned: AudioElement(reference, True, learned), REFERENCES, st.booleans()),
    st.builds(TokensElement, REFERENCES, st.booleans()),
)
TEXTS = st.builds(TextElement, st.sampled_from(["one ", "二\n", "<C_Q>", '{"path"}']), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(MEDIA, TEXTS), max_size=5))
def test_elements_are_read_as_they_were_written(pairs):
    elements = [element for pair in pairs for element in pair]
    assert parse_prompt(write_prompt(elements)) == elements


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        (turn("What?", "That.", system="Be kind."), "Be kind.\nWhat?\nThat."),
        ('a<img_start_baichuan>{"local": "b.png"}<img_end_baichuan>c', "ac"),
        (" <C_Q>  ", ""),
    ],
)
def test_plain_text_has_neither_media_nor_marks(prompt, read):
    assert plain_text(prompt) == read
