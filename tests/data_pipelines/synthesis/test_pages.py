"""Pages and charts: no character lost, answers that follow from the table, refusals, the same pictures again."""

import json
import random
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import parse_prompt, plain_text
from data_pipelines.documents.prompts import ImageElement
from data_pipelines.errors import SampleError
from data_pipelines.synthesis import __main__ as command
from data_pipelines.synthesis.charts.drawing import draw_chart
from data_pipelines.synthesis.charts.tables import (
    Chart,
    describe,
    possible_charts,
    questions,
    read_table,
    spell,
    transcribe,
)
from data_pipelines.synthesis.pages.job import PAGES, PageConfig, make_pages, page_questions
from data_pipelines.synthesis.pages.layout import PageStyle, balance, draw_page, measurer, normalize, paginate, wrap
from data_pipelines.synthesis.units import Draft
from data_pipelines.text.fonts import choose_font, find_fonts
from tests.helpers.synthesis_hooks import job_of

FONTS = find_fonts()
RAIN = "# Rainfall\ncity,May,June\nOslo,53,68\nRome,34,27\nLagos,215,336.5\n"
COPIES = "year,copies\n2018,12\n2019,14\n2020,9.75\n2021,17\n"
TEXTS = st.text(st.sampled_from("ab c,.。，“”（）中文字\n0"), max_size=200)


def page_style(**changes) -> PageStyle:
    return PageStyle(**{"width": 280, "height": 196, "font": FONTS[-1], "size": 14, **changes})


def document(text: str, kind: str = "text", name: str = "d") -> Document:
    return Document(name, kind, text, "m.jsonl:1", Path())


def length(text: str) -> float:
    """A font whose letters are all 1 pixel wide."""
    return float(len(text))


def draft_of(one: Document, **options) -> Draft:
    draft = Draft(one, "pages", "pages-00000", 0)
    make_pages(one, draft, PageConfig(**{"fonts": FONTS, **options}))
    return draft


def test_matplotlib_fonts_have_latin_letters_and_no_chinese():
    rng = random.Random(0)
    own = [font for font in FONTS if "DejaVu" in font]
    assert choose_font(rng, own, "Plain text, ÄÖÜ 3.14 €") in own
    with pytest.raises(SampleError, match="lacks 2, such as 你好") as missing:
        choose_font(rng, own, "Hello 你好")
    assert missing.value.cause == "no_font"


@pytest.mark.parametrize("text", ["שלום", "مرحبا", "नमस्ते"])
def test_scripts_that_must_be_shaped_are_refused(text):
    with pytest.raises(SampleError, match="cannot be set") as refused:
        choose_font(random.Random(0), FONTS, text)
    assert refused.value.cause == "bad_script"


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(1, 40), st.integers(1, 2))
def test_no_character_is_lost_between_lines_and_pages(text, width, columns):
    text = normalize(text)
    lines = list(wrap(text, width, length))
    assert "".join(line.text + "\n" * line.ends for line in lines).strip() == text
    assert all(len(line.text.rstrip(" ")) <= width for line in lines)
    style = page_style(columns=columns)
    laid = list(paginate(iter(lines), style))
    for set_ in (laid, balance(laid, style)):
        assert [line for page in set_ for _, _, line in page.lines] == lines
    assert all(page.bottom <= style.height - style.margin for page in laid)
    assert all(20 <= x < style.width and y >= style.margin for page in laid for x, y, _ in page.lines)


def test_columns_of_the_last_page_are_balanced():
    style = page_style(columns=2, height=392)
    laid = list(paginate(wrap("\n".join("abcdefgh"), style.column_width, length), style))
    (page,) = balance(laid, style)
    left = {x for x, _, _ in page.lines}
    assert [len([x for x, _, _ in page.lines if x == place]) for place in sorted(left)] == [4, 4]
    assert page.bottom < laid[0].bottom


def test_lines_break_where_chinese_and_english_allow():
    lines = [line.text for line in wrap("他说：“好，走吧。”then we left", 5, length)]
    assert lines == ["他说：", "“好，走", "吧。”", "then ", "we ", "left"]
    assert [line.text for line in wrap("unbreakable", 4, length)] == ["unbr", "eaka", "ble"]


def test_a_page_shows_its_lines_and_nothing_outside():
    style = page_style()
    (page,) = paginate(wrap("one two\nthree", style.column_width, measurer(style)), style)
    image = draw_page(page, style)
    assert image.width == 280
    assert image.height % 28 == 0
    dark = np.asarray(image.convert("L")) < 128
    rows = [dark[y : y + 19].any() for _, y, _ in page.lines]
    assert rows == [True, True]
    inside = np.zeros_like(dark)
    inside[style.margin : page.bottom, style.margin : style.width - style.margin] = True
    assert not (dark & ~inside).any()


def test_ocr_answers_are_the_text_and_interleaved_parts_come_once():
    text = " ".join(f"Sentence number {i} is here." for i in range(40))
    draft = draft_of(document(text), widths=(448,), letters=(14, 16), worn=0.0)
    by_type: dict[str, list[str]] = {}
    for _, values in draft.documents:
        by_type.setdefault(values["type"], []).append(values["text"])
    answers = [prompt.partition("<trainable_start>")[2].partition("<trainable_end>")[0] for prompt in by_type["ocr"]]
    assert " ".join(answers) == text
    assert len(by_type["interleaved"]) == 5
    learned = "".join(plain_text(prompt) for prompt in by_type["interleaved"])
    pictures = sum(isinstance(e, ImageElement) for prompt in by_type["interleaved"] for e in parse_prompt(prompt))
    assert pictures == 40 - learned.count("Sentence")
    assert all(learned.count(f"number {i} is") <= 1 for i in range(40))
    assert by_type["qa"]


def test_a_single_sentence_has_no_parts_to_alternate():
    assert [values["type"] for _, values in draft_of(document("One.")).documents] == ["ocr"]
    with pytest.raises(SampleError, match="no interleaved can be made") as short:
        draft_of(document("One."), types=("interleaved",))
    assert short.value.cause == "too_short"


def test_page_questions_are_answered_by_the_page():
    style = page_style(height=392)
    (page,) = paginate(wrap("First one. Second two. Third three.\nLast.", 100, measurer(style)), style)
    lines = [line.text.strip() for _, _, line in page.lines]
    answers = dict(page_questions(page, 1, random.Random(1), "en"))
    assert answers["What does the last line say?"] == "Last."
    assert answers["How many lines of text are there?"] == f"{len(lines)} lines."
    (ask,) = [ask for ask in answers if ask.startswith("What does line")]
    assert answers[ask] == lines[int(ask.split()[3]) - 1]
    (ask,) = [ask for ask in answers if ask.startswith("Which sentence")]
    following = {"First one.": "Second two.", "Second two.": "Third three.", "Third three.": "Last."}
    assert answers[ask] == following[ask.partition("“")[2].partition("”")[0]]


def test_tables_are_read_from_csv_and_json():
    table = read_table(RAIN)
    assert (table.title, table.header, table.labels) == ("Rainfall", "city", ("Oslo", "Rome", "Lagos"))
    assert [(one.name, list(map(spell, one.values))) for one in table.series] == [
        ("May", ["53", "34", "215"]),
        ("June", ["68", "27", "336.5"]),
    ]
    rows = [{"city": "Oslo", "May": 53, "note": "wet"}, {"city": "Rome", "May": 1234.50, "note": "dry"}]
    table = read_table(json.dumps({"title": "R", "rows": rows}))
    assert [list(map(spell, one.values)) for one in table.series] == [["53", "1234.5"]]
    assert spell(Decimal("-0.0")) == "0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b",
        "a,b\n1,x\n2,y",
        "a,b\n1,2\n1,3",
        "a,b\n1,2\n3",
        '{"rows": 3}',
        "[1]",
        "a,b\n1,NaN\n2,1e99",
        '"a,b\n1',
        f"{'a' * 61},b\n1,2\n3,4",
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(text):
    with pytest.raises(SampleError) as refused:
        draft_of(document(text, "table"))
    assert refused.value.cause == "bad_table"


def charts(text: str, kind: str) -> list[Chart]:
    return [chart for chart in possible_charts(read_table(text)) if chart.kind == kind]


def test_chart_answers_follow_from_the_table():
    chart = charts(RAIN, "bar")[0]
    answers = dict(questions(chart, random.Random(0), "en"))
    assert answers["Which city has the highest “May”?"] == "Lagos, with 215."
    assert answers["Which city has the lowest “May”?"] == "Rome, with 34."
    assert answers["How many values of city does the chart show?"] == "3."
    values = {"Oslo": Decimal(53), "Rome": Decimal(34), "Lagos": Decimal(215)}
    (ask,) = [ask for ask in answers if ask.startswith("By how much")]
    more, less = ask.removeprefix("By how much is “May” higher for ").removesuffix("?").split(" than for ")
    assert answers[ask] == f"By {values[more] - values[less]}."
    assert values[more] > values[less]
    (line,) = charts(COPIES, "line")
    answers = dict(questions(line, random.Random(0), "zh"))
    assert answers["从“2018”到“2021”，“copies”是上升还是下降？"] == "上升，从12升到17。"
    assert describe(line, "en").endswith("From 2018 to 2021, “copies” rises from 12 to 17.")
    assert transcribe(line).splitlines()[:2] == ["year, copies", "2018, 12"]


def test_what_cannot_be_seen_is_no_question():
    tie = charts("k,v\na,5\nb,5\nc,1\n", "bar")[0]
    assert not any("highest" in ask for ask, _ in questions(tie, random.Random(0), "en"))
    many = "day,n\n" + "".join(f"{i},{100 + i}\n" for i in range(30)) + "30,129.1\n"
    (line,) = charts(many, "line")
    answers = dict(questions(line, random.Random(0), "en"))
    assert not line.written
    assert not any(ask.startswith(("What is", "By how much")) or "highest" in ask for ask in answers)
    assert answers["Does “n” rise or fall from 0 to 30?"] == "It rises."
    (scatter,) = charts("p,x,y\n" + "".join(f"{i},{i},{-2 * i}\n" for i in range(6)), "scatter")
    assert describe(scatter, "en").endswith("The higher “x”, the lower “y”.")


@pytest.mark.filterwarnings("error")
def test_charts_are_drawn_alike_for_a_seed():
    chart = charts(COPIES, "line")[0]
    first, again = (np.asarray(draw_chart(chart, random.Random(1), FONTS[-1])) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape[0] % 28 == first.shape[1] % 28 == 0
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["bar", "pie", "scatter"])
def test_every_kind_of_chart_is_drawn(kind):
    """Signs of matplotlib's formulas in the names are letters like others."""
    chart = charts(
        "$\\frac{ k$,x$_$,y^_\n" + "".join(f"{name},{i + 1},{9 - i}\n" for i, name in enumerate("abcde")), kind
    )[-1]
    pixels = np.asarray(draw_chart(chart, random.Random(2), FONTS[-1]))
    assert 0.005 < (pixels.min(axis=-1) < 128).mean() < 0.6


@pytest.mark.parametrize("text", ['see <img_start_baichuan>{"local": "a.png"}<img_end_baichuan>', " <C_Q> "])
def test_documents_with_media_or_without_text_are_refused(text):
    with pytest.raises(SampleError) as refused:
        draft_of(document(text))
    assert refused.value.cause in ("has_media", "no_text")


def test_every_line_ends_in_an_output_or_is_skipped_with_any_number_of_workers(tmp_path):
    lines = [{"id": f"t{i}", "type": "text", "text": f"Text {i}. And more of it, number {i}."} for i in range(9)]
    lines += [{"id": "rain", "type": "table", "text": RAIN}, {"id": "bad", "type": "table", "text": "a"}]
    lines += [{"id": "hebrew", "text": "שלום"}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no json\n")
    arguments = ["pages", str(manifest), "--unit", "4", "--seed", "3", "--widths", "448"]
    assert command.main([*arguments, "--out", str(tmp_path / "a"), "--workers", "0"]) == 0
    assert command.main([*arguments, "--out", str(tmp_path / "b"), "--workers", "1"]) == 0
    files = [
        {
            path.relative_to(root): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        }
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1]
    made = [json.loads(line) for line in (tmp_path / "a/pages.jsonl").read_text().splitlines()]
    skipped = [json.loads(line) for line in (tmp_path / "a/skipped-pages.jsonl").read_text().splitlines()]
    assert {one["id"].partition("-")[0] for one in made} | {one["id"] for one in skipped} == {
        *(line["id"] for line in lines),
        None,
    }
    assert sorted(one["cause"] for one in skipped) == ["bad_json", "bad_script", "bad_table"]
    for one in made:
        for element in parse_prompt(one["text"]):
            if isinstance(element, ImageElement):
                with Image.open(BytesIO((tmp_path / "a" / element.reference.path).read_bytes())) as image:
                    assert image.width % 28 == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--widths", "100"], "--widths"),
        (["--letters", "30", "20"], "--letters"),
        (["--worn", "2"], "--worn"),
        (["--font", __file__], "is no readable font"),
    ],
)
def test_options_that_make_no_page_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        job_of(PAGES, "m.jsonl", "--out", "o", *options)
