"""Prompts written from elements are read as these elements again; what a reader sees of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.documents.prompt_writing import plain_text, turn, write_prompt
from data_pipelines.documents.prompts import Picture, Reference, Sound, Text, Tokens, Video, parse_prompt

REFERENCES = st.builds(Reference, path=st.sampled_from(["a.png", "目录/“b”.wav"])) | st.just(Reference(base64="AAAA"))
MEDIA = st.one_of(
    st.builds(Picture, REFERENCES, st.booleans()),
    st.builds(Video, REFERENCES),
    st.builds(lambda reference: Sound(reference), REFERENCES),
    st.builds(lambda reference, learnt: Sound(reference, True, learnt), REFERENCES, st.booleans()),
    st.builds(Tokens, REFERENCES, st.booleans()),
)
TEXTS = st.builds(Text, st.sampled_from(["one ", "二\n", "<C_Q>", '{"path"}']), st.booleans())


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
