"""Images of text and of tables: OCR, question and interleaved documents from text, charts from tables.

A document of type `table` holds CSV or JSON rows (`tables.py`) and becomes a chart; any other must be text alone and
is set on pages. Both are drawn in sizes, fonts and colors that the seed and the document's id choose.
"""

import hashlib
import random
import re
from argparse import ArgumentParser, Namespace
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import Source, conversation, image_tag, join, plain_text, trainable, turn
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.charts.tables import (
    ChartKind,
    describe,
    possible_charts,
    questions,
    read_table,
    transcribe,
)
from data_pipelines.synthesis.pages.layout import (
    GRID,
    Page,
    PageStyle,
    balance,
    draw_page,
    encode,
    measurer,
    normalize,
    paginate,
    wear,
    wrap,
)
from data_pipelines.synthesis.units import Draft, SynthesisTask, manifest_job

NAME = "pages"
TYPES = ("ocr", "chart", "interleaved", "qa")
LANGUAGES = ("en", "zh")
MANY_COLUMNS = 800  # characters: a shorter text stands in one column
TABLE = "table"  # type of the documents that hold one

READ_PAGE = {
    "en": (
        "Read the text in the picture.",
        "What does the picture say?",
        "Transcribe all text of this page.",
        "Extract the text from this image.",
    ),
    "zh": ("读出图片中的文字。", "图片上写了什么？", "请转写这一页的全部文字。", "提取这张图片里的文字。"),
}
DESCRIBE_CHART = {
    "en": ("Describe the chart.", "What does this chart show?", "Summarise the figure."),
    "zh": ("描述这张图表。", "这张图表说明了什么？", "概括这张图的内容。"),
}
TRANSCRIBE_CHART = {
    "en": ("Write the data of the chart as a table.", "Turn the chart into comma-separated values."),
    "zh": ("把图表中的数据写成表格。", "将这张图表转换为逗号分隔的数据。"),
}

MAX_QUESTIONS = 3  # of one document
MAX_PARTS = 8  # of one interleaved document
INKS = ((0, 0, 0), (20, 20, 60), (60, 30, 20), (40, 40, 40))
_LINE = {"en": "What does line {} say?", "zh": "第{}行写的是什么？"}
_LAST = {"en": "What does the last line say?", "zh": "最后一行写的是什么？"}
_COUNT = {"en": ("How many lines of text are there?", "{} lines."), "zh": ("图中有多少行文字？", "{}行。")}
_NEXT = {"en": "Which sentence comes after “{}”?", "zh": "“{}”的后一句是什么？"}

MAX_COUNTED = 20  # lines that a question may let count
_SENTENCE = re.compile(r".+?(?:[.!?]+(?=\s|$)|[。！？]+[”’」』]?|$)")
PAPERS = ((255, 255, 255), (250, 247, 238), (238, 242, 246), (245, 245, 245))


@dataclass(frozen=True)
class PageConfig:
    """How pages look and what is made of them."""

    types: tuple[str, ...] = TYPES
    """Types of the documents that are made."""
    languages: tuple[str, ...] = LANGUAGES
    """Languages of the prompts."""
    fonts: tuple[str, ...] = ()
    """Font files to choose from."""
    widths: tuple[int, ...] = (448, 560, 672, 784)
    """Pixels: multiples of `GRID`, so that no page is resized."""
    letters: tuple[int, int] = (14, 26)
    """Smallest and largest font size in pixels."""
    columns: int = 2
    """At most so many, on a page wide enough."""
    worn: float = 0.3
    """Share of the pages that are turned, blurred, noisy."""
    seed: int = 0
    """Another seed gives other pages."""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the task's own options."""
    add, default = parser.add_argument, PageConfig()
    add("--types", nargs="+", choices=TYPES, default=TYPES, help=f"what to make (default {' '.join(TYPES)})")
    add("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES, help="of the prompts (default en zh)")
    add("--font", metavar="FILE", type=Path, nargs="+", default=(), help="fonts to use besides the installed ones")
    add("--widths", metavar="PIXELS", type=int, nargs="+", default=default.widths, help="of pages: multiples of 28")
    add("--letters", metavar="PIXELS", type=int, nargs=2, default=default.letters, help="smallest and largest letters")
    add("--columns", type=int, default=default.columns, help="at most so many on a wide page (default 2)")
    add("--worn", metavar="SHARE", type=float, default=default.worn, help="turned, blurred, noisy (default 0.3)")
    add("--seed", type=int, default=0, help="another seed gives other pages (default 0)")


def make_job(options: Namespace) -> Job:
    """Makes the job of `options`.

    Raises ConfigError for sizes that make no page, a font that cannot be read, and where matplotlib is missing.
    """
    try:
        from data_pipelines.text.fonts import find_fonts  # imports matplotlib, which an extra brings
    except ImportError as error:
        raise ConfigError("pages need matplotlib: pip install baichuan_omni_jax[synthesis]") from error
    config = PageConfig(
        types=tuple(sorted(set(options.types))),
        languages=tuple(sorted(set(options.languages))),
        fonts=find_fonts(options.font),
        widths=tuple(options.widths),
        letters=tuple(options.letters),
        columns=options.columns,
        worn=options.worn,
        seed=options.seed,
    )
    if any(width % GRID or not 224 <= width <= 2800 for width in config.widths):
        raise ConfigError(f"--widths {config.widths} must be multiples of {GRID} between 224 and 2800")
    if not 8 <= config.letters[0] <= config.letters[1] <= min(config.widths) // 14:
        raise ConfigError(f"--letters {config.letters} must lie between 8 and a 14th of the narrowest page")
    if not 0 <= config.worn <= 1 or config.columns < 1:
        raise ConfigError(f"--worn {config.worn} is a share of 1, and --columns {config.columns} at least 1")
    # The fonts' bytes, not their paths, decide what the pages are.
    digests = [hashlib.sha256(Path(font).read_bytes()).hexdigest() for font in config.fonts]
    return manifest_job(NAME, partial(make_pages, config=config), options, f"{astuple(config)} {digests}")


def make_pages(document: Document, draft: Draft, config: PageConfig) -> None:
    """Adds to the draft what `config` ask for.

    Raises SampleError: "no_font", "bad_script" (`fonts.choose_font`), "bad_table", "bad_prompt", "has_media",
    "no_text", "too_short" for text of which nothing of `config.types` can be made.
    """
    rng = random.Random(f"{config.seed}/{document.id}")
    if document.type == TABLE:
        _make_chart(document, draft, config, rng)
    else:
        _make_text_pages(document, draft, config, rng)
    if not draft.documents:
        raise SampleError("too_short", f"no {' or '.join(config.types)} can be made of it")


def _make_text_pages(document: Document, draft: Draft, config: PageConfig, rng: random.Random) -> None:
    if any(not isinstance(element, TextElement) for element in parse_prompt(document.text)):
        raise SampleError("has_media", "only text can be set on pages")
    # One style for all pages of a document, as in a book.
    text = normalize(plain_text(document.text))
    style = _choose_style(text, config, rng)
    language = rng.choice(config.languages)
    if "ocr" in config.types or "qa" in config.types:
        for page in _set(text, style):
            image = _keep(draw_page(page, style), draft, config, rng, style.paper)
            pairs = page_questions(page, style.columns, rng, language)
            if "ocr" in config.types:
                draft.add(turn(image + rng.choice(READ_PAGE[language]), page.text), "ocr")
            if "qa" in config.types and pairs:
                draft.add(_question_turns(image, pairs, rng), "qa")
    if "interleaved" in config.types:
        _interleave(text, style, draft, config, rng)


def _interleave(text: str, style: PageStyle, draft: Draft, config: PageConfig, rng: random.Random) -> None:
    """Sets parts of the text in turns as pages and as text to be learned, `MAX_PARTS` or one more in a document."""
    # By paragraphs or, where there is one alone, by sentences.
    paragraphs = text.split("\n")
    parts = paragraphs if len(paragraphs) > 1 else sentences(text)
    if len(parts) < 2:
        return
    style = replace(style, columns=1)
    starts = list(range(0, len(parts) - 1, MAX_PARTS))  # a last part by itself joins those before
    for start, stop in zip(starts, [*starts[1:], len(parts)], strict=True):
        drawn, prompt = rng.random() < 0.5, Source()
        for part in parts[start:stop]:
            pages = _set(part, style) if drawn else []
            images = (_keep(draw_page(page, style), draft, config, rng, style.paper) for page in pages)
            prompt += join(images) if drawn else trainable(part)
            drawn = not drawn
        draft.add(prompt, "interleaved")


def _make_chart(document: Document, draft: Draft, config: PageConfig, rng: random.Random) -> None:
    from data_pipelines.synthesis.charts.drawing import draw_chart
    from data_pipelines.text.fonts import choose_font

    # A kind first, then a chart of it: otherwise bars, of which a table allows most, would crowd out the others.
    table = read_table(plain_text(document.text))
    font = choose_font(rng, config.fonts, table.words + "0123456789")
    kinds: dict[str, list] = {}
    for chart in possible_charts(table):
        kinds.setdefault(chart.kind, []).append(chart)
    if not kinds:
        raise SampleError("bad_table", f"no chart of the kinds {', '.join(get_args(ChartKind))} can hold the table")
    chart = rng.choice(kinds[rng.choice(sorted(kinds))])
    language = rng.choice(config.languages)
    image = _keep(draw_chart(chart, rng, font), draft, config, rng, (255, 255, 255))
    # What is drawn serves every type of document: transcription or description, questions, running text.
    if "chart" in config.types:
        if chart.written and rng.random() < 0.5:
            draft.add(turn(image + rng.choice(TRANSCRIBE_CHART[language]), transcribe(chart)), "chart")
        else:
            request = image + rng.choice(DESCRIBE_CHART[language])
            draft.add(turn(request, describe(chart, language)), "chart")
    if "qa" in config.types and (pairs := questions(chart, rng, language)):
        draft.add(_question_turns(image, pairs, rng), "qa")
    if "interleaved" in config.types:
        title = trainable(table.title) if table.title else Source()
        draft.add(title + image + trainable(describe(chart, language)), "interleaved")


def _question_turns(image: Source, pairs: list[tuple[str, str]], rng: random.Random) -> Source:
    chosen = pairs[: rng.randint(1, MAX_QUESTIONS)]
    return conversation([(image * (i == 0) + question, answer) for i, (question, answer) in enumerate(chosen)])


def _choose_style(text: str, config: PageConfig, rng: random.Random) -> PageStyle:
    from data_pipelines.text.fonts import choose_font

    if not text:
        raise SampleError("no_text", "there is no text in it")
    # The font first: it must have every character of the text.
    font = choose_font(rng, config.fonts, text)
    width, size = rng.choice(config.widths), rng.randint(*config.letters)
    height = round(width * rng.choice((1.0, 1.25, 1.4)) / GRID) * GRID
    most = min(config.columns, width // (16 * size)) if len(text) >= MANY_COLUMNS else 1
    columns = rng.randint(1, max(1, most))
    # One page in ten is light on dark.
    dark = rng.random() < 0.1
    ink, paper = rng.choice(INKS), rng.choice(PAPERS)
    ink, paper = (paper, ink) if dark else (ink, paper)
    return PageStyle(width, height, font, size, columns, ink, paper)


def _set(text: str, style: PageStyle) -> list[Page]:
    pages = list(paginate(wrap(text, style.column_width, measurer(style)), style))
    return balance(pages, style)


def _keep(
    image: Image.Image, draft: Draft, config: PageConfig, rng: random.Random, paper: tuple[int, int, int]
) -> Source:
    """Writes an image, worn or not; returns its tag."""
    worn = rng.random() < config.worn
    return image_tag(draft.save(*encode(wear(image, rng, paper) if worn else image, worn, rng)))


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, in order; a line end ends one, too."""
    found = (match.strip() for line in text.split("\n") for match in _SENTENCE.findall(line))
    return [sentence for sentence in found if sentence]


def page_questions(page: Page, columns: int, rng: random.Random, language: str) -> list[tuple[str, str]]:
    """Asks questions about a page and their answers, in an order that `rng` chooses: a line, how many, the next
    sentence.
    """
    # Lines are only counted where a reader can count them: in one column, and not too many.
    lines = [line.text.strip() for _, _, line in page.lines]
    pairs = []
    if columns == 1 and len(lines) >= 2:
        place = rng.randrange(min(len(lines), MAX_COUNTED) - 1)
        pairs.append((_LINE[language].format(place + 1), lines[place]))
        pairs.append((_LAST[language], lines[-1]))
        if len(lines) <= MAX_COUNTED:
            question, answer = _COUNT[language]
            pairs.append((question, answer.format(len(lines))))
    # A sentence that stands twice has no one that follows it.
    whole = sentences(page.text)
    before = [i for i in range(len(whole) - 1) if whole.count(whole[i]) == 1]
    if before:
        place = rng.choice(before)
        pairs.append((_NEXT[language].format(whole[place]), whole[place + 1]))
    rng.shuffle(pairs)
    return pairs


PAGES = SynthesisTask(
    NAME,
    "Images of text and of tables: OCR, question and interleaved documents from text, charts from tables.",
    add_arguments,
    make_job,
)
