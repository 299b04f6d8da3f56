"""Text cut at punctuation: nothing is lost, nothing is cut that belongs together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.synthesis.speech.tasks import group_pieces
from data_pipelines.text.spoken_text import split_text, spoken_seconds

ALPHABET = [*"ab Z1.,;!?。，！？；…“”\"'「」()（）\n湖水很平静", "Dr.", "e.g.", "3.14", "Ж", "é", "😀", "\u3000"]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=150).map("".join)


@settings(max_examples=400)
@given(
    text=TEXTS, shortest=st.sampled_from([0.0, 0.5, 1.0]), longest=st.sampled_from([1.0, 2.5]), sentences=st.booleans()
)
def test_pieces_are_the_text_and_as_long_as_asked(text, shortest, longest, sentences):
    pieces = split_text(text, shortest, longest, sentences=sentences)
    assert "".join(pieces) == text
    lengths = [spoken_seconds(piece) for piece in pieces]
    assert max(lengths, default=0) <= longest + 1e-9
    if len(pieces) > 1:
        assert all(lengths), "a piece without anything to speak"
    for place, length in enumerate(lengths):
        # The last piece is as short as what is left, as the last of an answer is.
        if length < shortest and (sentences or place < len(lengths) - 1):
            neighbors = [lengths[other] for other in (place - 1, place + 1) if 0 <= other < len(lengths)]
            assert all(length + other > longest - 1e-9 for other in neighbors), "a short piece that had room elsewhere"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Stop! Go, now; or stay? Yes.", ["Stop!", " Go,", " now; or stay?", " Yes."]),
        ("天气很好，出发！去哪？山上；走…好。", ["天气很好，", "出发！", "去哪？", "山上；走…好。"]),
        ("It is 3.14, not 1,000.5. Pi.", ["It is 3.14,", " not 1,000.5.", " Pi."]),
        ("Dr. Li, Ph.D., met J. K. Lo at 3 p.m. today.", ["Dr. Li,", " Ph.D.,", " met J. K. Lo at 3 p.m. today."]),
        ("See e.g. No. 5 on example.com. No. Not that.", ["See e.g. No. 5 on example.com.", " No.", " Not that."]),
        ("他说：“好。走吧！”就走了。", ["他说：“好。走吧！”", "就走了。"]),
        ('He said "No. Go." Then he left.', ['He said "No. Go."', " Then he left."]),
        ("「早。」她说，《左传，右传》好看。", ["「早。」", "她说，", "《左传，右传》好看。"]),
        ("Wait... what?! (Yes.) Fine", ["Wait...", " what?!", " (Yes.)", " Fine"]),
        ("One.\n\nTwo\nthree", ["One.", "\n\nTwo\nthree"]),
    ],
)
def test_where_a_text_is_cut(text, pieces):
    assert split_text(text, shortest=0.0) == pieces


def test_sentences_keep_their_clauses_and_lines_end_them():
    assert split_text("A, b; c. D，e…f。", 0.0, sentences=True) == ["A, b; c.", " D，e…", "f。"]
    assert split_text("One\n\ntwo", 0.0, sentences=True) == ["One", "\n\ntwo"]


def test_a_piece_too_long_is_cut_in_quotes_then_at_spaces_then_anywhere():
    assert split_text("“One two. Three four.” five", 0.0, 0.7) == ["“One two.", " Three four.”", " five"]
    assert split_text("one; two: three\nfour", 0.0, 0.6) == ["one;", " two: three", "\nfour"]
    assert split_text("one two three", 0.0, 0.6) == ["one two", " three"]
    assert split_text("湖水很平静", 0.0, 0.5) == ["湖水", "很平", "静"]


def test_short_pieces_join_the_next_and_short_last_sentences_the_one_before():
    assert split_text("No. He went home early. No.", 1.0) == ["No. He went home early.", " No."]
    assert split_text("No. He went home early. No.", 1.0, sentences=True) == ["No. He went home early. No."]
    assert split_text("He went home early. -", 1.0) == ["He went home early. -"]


def test_lengths_that_make_no_sense():
    with pytest.raises(ValueError, match="the shortest is at most the longest"):
        split_text("a", 3.0, 2.0)


@given(count=st.integers(1, 200), size=st.integers(3, 20))
def test_groups_are_even_and_none_is_left_alone(count, size):
    groups = group_pieces(list(map(str, range(count))), size)
    assert [piece for group in groups for piece in group] == list(map(str, range(count)))
    assert max(map(len, groups)) <= size
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert count == 1 or min(map(len, groups)) >= 2
