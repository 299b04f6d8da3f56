"""The rule that ends a piece of spoken text: examples in both languages, and the device's form equals the splitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baichuan_omni_jax.config import READ_AT_LEAST, GenerationConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.generation.segments import advance_segment, init_progress, next_segment
from data_pipelines.text.speech_segments import cut_places, piece_table, spoken_units
from data_pipelines.text.spoken_text import split_text
from data_pipelines.tokenizers.tokenizer import encode, train_tokenizer

# Words of both languages, all that the rule knows of, and what stands beside marks in real text.
PARTS = [
    *(" Gen", " p", '6"', "1，000", "20，"),
    *("one", " two", " Dr", " dr", "U", ".S", " I", " No", "no", " Ph", ".D", "etc", " example", ".com", " said"),
    *("湖水", "很平静", "我们", "他说", "3", "14", "2", "1,000", " 5", "U.S.", " J. K. Lo", "e.g.", "3.14"),
    *(",", ".", "!", "?", "，", "。", "！", "？", "；", ";", "…", "...", "?!", "。”", '."', ".\n", ",“"),
    *(" ", "  ", "\n", "\n\n", "“", "”", "「", "」", "《", "》", '"', ' "', "'", "（", "）", "(", ")", "-", " —"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)
SAMPLES = (
    "We paid 1,000. Dr. Li left, and I stayed! Is it 3.14? “Yes. It is,” he said, in the U.S. court, at 3 p.m. today.",
    "湖水很平静。我们坐船，然后回家了！他说：“好。走吧！”就走了，好吗？「早。」她说，《左传，右传》很好看。（是的。）",
    'He said, "No. Go." Then: see No. 5 on example.com... No. Not that?! J. K. Lo, Ph.D., etc.) (one) two; three…',
)


def words_of_both_languages() -> list[str]:
    """Texts in which each part stands beside many others, so that tokens hold marks with what follows them."""
    rng = np.random.default_rng(0)
    return [
        *SAMPLES * 30,
        *("".join(rng.choice(PARTS, 60)) for _ in range(300)),
        *["，我们走", "，他说，我们", ".S,so"] * 400,
    ]


@pytest.fixture(scope="module")
def tokenizers():
    """One that writes little more than a character at a time, and one with long tokens, `，我们` among them."""
    return [train_tokenizer(words_of_both_languages(), size) for size in (520, 1000)]


@jax.jit
def follow(table, progress, tokens, count, least):
    """What each of the first `count` tokens comes to as long as no piece has ended and all are written as they are."""

    def step(progress, token):
        ripe = (progress.units > 0) & (progress.units >= least)
        found = advance_segment(table, progress, token[None], ripe)
        return found.progress, found

    _, steps = jax.lax.scan(step, progress, tokens)
    # What is written of a token that has to be shortened ends no piece, but the model goes on behind it.
    stops = (steps.before | steps.within | (steps.token != tokens[:, None]))[:, 0] & (jnp.arange(len(tokens)) < count)
    return steps, stops


@pytest.fixture(scope="module")
def pieces_by_tokens(tokenizers):
    """Texts cut as the engine cuts its own, a token at a time; pieces take `least` seconds."""
    tables = [jax.tree.map(jnp.asarray, piece_table(tokenizer, 1000)) for tokenizer in tokenizers]

    def cut(which: int, text: str, least: float) -> list[str]:
        tokenizer, progress, pieces, begun = tokenizers[which], init_progress(1), [], ""
        while True:
            # The model goes on with what was not written.
            rest = encode(tokenizer, text[len("".join(pieces) + begun) :])
            padded = np.resize(np.array([*rest, 0], np.int32), 512)
            found = follow(tables[which], progress, padded, len(rest), round(100 * least))
            steps, stops = jax.tree.map(np.asarray, found)
            if not stops.any():
                break
            stop = int(stops.argmax())
            before, within = bool(steps.before[stop, 0]), bool(steps.within[stop, 0])
            begun += tokenizer.decode([*rest[:stop], *([] if before else [int(steps.token[stop, 0])])])
            at = stop - 1 if before else stop
            progress = jax.tree.map(lambda x, at=at: x[at], steps.progress)
            if before or within:
                pieces, begun, progress = [*pieces, begun], "", next_segment(progress)
            progress = jax.tree.map(np.asarray, progress)
        last = begun + tokenizer.decode(rest)
        if pieces and not spoken_units(last):  # the engine ends an answer without speaking this
            return [*pieces[:-1], pieces[-1] + last]
        return [*pieces, last] if last else pieces

    return cut


@pytest.mark.parametrize("which", [0, 1])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS | st.sampled_from(SAMPLES), least=st.sampled_from([0.0, 0.3, 1.0]))
def test_the_engine_ends_pieces_where_the_splitter_cuts(pieces_by_tokens, tokenizers, which, text, least):
    assert pieces_by_tokens(which, text, least) == split_text(text, least, longest=1e6)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("text", ["one —.\nTwo", "one —.\n\nTwo", "one...\nTwo", "said.”\n“Two"])
def test_a_cut_far_inside_a_token_ends_the_piece(tokenizers, pieces_by_tokens, which, text):
    """A beginning that is no token is written in two: a shorter one, and what the model says then."""
    pieces = pieces_by_tokens(which, text, 0.0)
    assert pieces == split_text(text, 0.0)
    assert pieces[1].startswith("\n")


def test_a_mark_within_a_token_is_told_from_what_follows(tokenizers, pieces_by_tokens):
    """`，我们` is one token of the larger tokenizer: the piece keeps the mark alone."""
    assert any("，我" in tokenizers[1].decode([i]) for i in encode(tokenizers[1], "他说，我们很平静。"))
    assert pieces_by_tokens(1, "他说，我们很平静。", 0.0) == ["他说，", "我们很平静。"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It is 3.14, not 1,000.5. Pi.", ["It is 3.14,", " not 1,000.5.", " Pi."]),
        ("Dr. Smith of the U.S. army left. Fine.", ["Dr. Smith of the U.S. army left.", " Fine."]),
        ("Mr. J. K. Lo, e.g. at 3 p.m. today. I. You?", ["Mr. J. K. Lo,", " e.g. at 3 p.m. today.", " I.", " You?"]),
        ("See No. 5. No. Not example.com!", ["See No. 5.", " No.", " Not example.com!"]),
        ("Stop! Go,now; or stay?Yes.", ["Stop!", " Go,", "now; or stay?", "Yes."]),
        ("天气很好，出发！去哪？山上。", ["天气很好，", "出发！", "去哪？", "山上。"]),
        ("共1,000元，约3.14倍。你好,走吧", ["共1,000元，", "约3.14倍。", "你好,", "走吧"]),
        ("他说：“好。走吧！”就走了。", ["他说：“好。走吧！”", "就走了。"]),
        ('He said "No. Go." Then left', ['He said "No. Go."', " Then left"]),
        ("“Never closed. So\nit ends. Here", ["“Never closed. So\nit ends.", " Here"]),
        ("Wait... what?! (Yes.) 5 men", ["Wait...", " what?!", " (Yes.)", " 5 men"]),
        ("共1，000元，你呢？今年20，好。", ["共1，000元，", "你呢？", "今年20，", "好。"]),
        (
            'It is 55" wide, so 6\' 2" is it. "In 1999," he',
            ['It is 55" wide,', " so 6' 2\" is it.", ' "In 1999,"', " he"],
        ),
        (
            "See p. 5, Gen. Lee at Mt. Etna. It’s Bob's. Go",
            ["See p. 5,", " Gen. Lee at Mt. Etna.", " It’s Bob's.", " Go"],
        ),
        (
            "Cost 3.5% at 12:30, v1.2.3, 3,5 kg. Ask a.b@c.com, ok",
            [
                *("Cost 3.5% at 12:30,", " v1.2.3,", " 3,5 kg.", " Ask a.b@c.com,", " ok"),
            ],
        ),
    ],
)
def test_where_a_piece_ends(text, pieces):
    places = cut_places(text)
    assert [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)] == pieces


def test_one_least_length_for_synthesis_reading_and_answers():
    """Ten Chinese characters, as the released demos read."""
    assert READ_AT_LEAST == GenerationConfig().segment_seconds == 2.5
    text = "一二三四五六七八九，一二三四五六七八九十，好。"
    assert split_text(text) == ["一二三四五六七八九，一二三四五六七八九十，", "好。"]
    assert cut_places(text, READ_AT_LEAST) == [len(text) - 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segment_seconds": -1.0}, "segment_seconds -1.0 must lie between"),
        ({"max_segments": 0}, "max_segments 0 must be at least 1"),
        ({"voice": "a】b"}, "without 【 and 】"),
        ({"voice": " "}, "must be a name"),
        ({"voice": "a\u2028b"}, "in one line"),
        ({"voice": "\ud800"}, "not valid Unicode"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**values)
