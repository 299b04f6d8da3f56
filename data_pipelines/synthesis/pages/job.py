"""Pictures of text and of tables: OCR, question and interleaved documents from text, charts from tables.

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

from PIL import Image

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.jobs.job import Job
from data_pipelines.documents.document import Document
from data_pipelines.documents.prompt_writing import Source, conversation, image_tag, join, plain_text, trainable, turn
from data_pipelines.documents.prompts import TextElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.synthesis.charts.questions import describe, questions, transcribe
from data_pipelines.synthesis.charts.tables import KINDS, possible_charts, read_table
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
from data_pipelines.synthesis.prompts import DESCRIBE_CHART, READ_PAGE, TRANSCRIBE_CHART
from data_pipelines.synthesis.units import Draft, SynthesisTask, manifest_job

NAME = "pages"
TYPES = ("ocr", "chart", "interleaved", "qa")
LANGUAGES = ("en", "zh")
MANY_COLUMNS = 800  # characters: a shorter text stands in one column
TABLE = "table"  # type of the documents that hold one

MAX_QUESTIONS = 3  # of one document
MAX_PARTS = 8  # of one interleaved document
INKS = ((0, 0, 0), (20, 20, 60), (60, 30, 20), (40, 40, 40))
_LINE = {"en": "What does line {} say?", "zh": "第{}行写的是什么？"}
_LAST = {"en": "What does the last line say?", "zh": "最后一行写的是什么？"}
_COUNT = {"en": ("How many lines of text are there?", "{} lines."), "zh": ("图中有多少行文字？", "{}行。")}
_NEXT = {"en": "Which sentence comes after “{}”?", "zh": "“{}”的后一句是什么？"}

MAX_COUNTED = 20  # lines that one can be asked to count
_SENTENCE = re.compile(r".+?(?:[.!?]+(?=\s|$)|[。！？]+[”’」』]?|$)")
PAPERS = ((255, 255, 255), (250, 247, 238), (238, 242, 246), (245, 245, 245))


@dataclass(frozen=True)
class PageConfig:
    """How pages look and what is made of them. `letters` are the smallest and the largest font size in pixels."""

    types: tuple[str, ...] = TYPES
    languages: tuple[str, ...] = LANGUAGES
    fonts: tuple[str, ...] = ()
    widths: tuple[int, ...] = (448, 560, 672, 784)
    letters: tuple[int, int] = (14, 26)
    columns: int = 2
    worn: float = 0.3
    seed: int = 0


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
    settings = PageConfig(
        types=tuple(sorted(set(options.types))),
        languages=tuple(sorted(set(options.languages))),
        fonts=find_fonts(options.font),
        widths=tuple(options.widths),
        letters=tuple(options.letters),
        columns=options.columns,
        worn=options.worn,
        seed=options.seed,
    )
    if any(width % GRID or not 224 <= width <= 2800 for width in settings.widths):
        raise ConfigError(f"--widths {settings.widths} must be multiples of {GRID} between 224 and 2800")
    if not 8 <= settings.letters[0] <= settings.letters[1] <= min(settings.widths) // 14:
        raise ConfigError(f"--letters {settings.letters} must lie between 8 and a 14th of the narrowest page")
    if not 0 <= settings.worn <= 1 or settings.columns < 1:
        raise ConfigError(f"--worn {settings.worn} is a share of 1, and --columns {settings.columns} at least 1")
    digests = [hashlib.sha256(Path(font).read_bytes()).hexdigest() for font in settings.fonts]
    return manifest_job(NAME, partial(make_pages, settings=settings), options, f"{astuple(settings)} {digests}")


def make_pages(document: Document, draft: Draft, settings: PageConfig) -> None:
    """Adds to the draft what `settings` ask for.

    Raises SampleError: "no_font", "bad_script" (`fonts.choose_font`), "bad_table", "bad_prompt", "has_media",
    "no_text", "too_short" for text of which nothing that was asked for can be made.
    """
    rng = random.Random(f"{settings.seed}/{document.id}")
    if document.type == TABLE:
        _make_chart(document, draft, settings, rng)
    else:
        _make_text_pages(document, draft, settings, rng)
    if not draft.documents:
        raise SampleError("too_short", f"no {' or '.join(settings.types)} can be made of it")


def _make_text_pages(document: Document, draft: Draft, settings: PageConfig, rng: random.Random) -> None:
    text = normalize(_text_alone(document))
    style = _choose_style(text, settings, rng)
    language = rng.choice(settings.languages)
    if "ocr" in settings.types or "qa" in settings.types:
        for page in _set(text, style):
            picture = _keep(draw_page(page, style), draft, settings, rng, style.paper)
            asked = page_questions(page, style.columns, rng, language)
            if "ocr" in settings.types:
                draft.add(turn(picture + rng.choice(READ_PAGE[language]), page.text), "ocr")
            if "qa" in settings.types and asked:
                draft.add(_ask(picture, asked, rng), "qa")
    if "interleaved" in settings.types:
        _interleave(text, style, draft, settings, rng)


def _interleave(text: str, style: PageStyle, draft: Draft, settings: PageConfig, rng: random.Random) -> None:
    """Sets parts of the text in turns as pages and as text to be learned, `MAX_PARTS` or one more in a document."""
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
            pictures = (_keep(draw_page(page, style), draft, settings, rng, style.paper) for page in pages)
            prompt += join(pictures) if drawn else trainable(part)
            drawn = not drawn
        draft.add(prompt, "interleaved")


def _make_chart(document: Document, draft: Draft, settings: PageConfig, rng: random.Random) -> None:
    from data_pipelines.synthesis.charts.drawing import draw_chart
    from data_pipelines.text.fonts import choose_font

    table = read_table(plain_text(document.text))
    font = choose_font(rng, settings.fonts, table.words + "0123456789")
    kinds: dict[str, list] = {}
    for chart in possible_charts(table):
        kinds.setdefault(chart.kind, []).append(chart)
    if not kinds:
        raise SampleError("bad_table", f"no chart of the kinds {', '.join(KINDS)} can hold the table")
    chart = rng.choice(kinds[rng.choice(sorted(kinds))])
    language = rng.choice(settings.languages)
    picture = _keep(draw_chart(chart, rng, font), draft, settings, rng, (255, 255, 255))
    if "chart" in settings.types:
        if chart.written and rng.random() < 0.5:
            draft.add(turn(picture + rng.choice(TRANSCRIBE_CHART[language]), transcribe(chart)), "chart")
        else:
            asked = picture + rng.choice(DESCRIBE_CHART[language])
            draft.add(turn(asked, describe(chart, language)), "chart")
    if "qa" in settings.types and (asked := questions(chart, rng, language)):
        draft.add(_ask(picture, asked, rng), "qa")
    if "interleaved" in settings.types:
        title = trainable(table.title) if table.title else ""
        draft.add(title + picture + trainable(describe(chart, language)), "interleaved")


def _ask(picture: Source, asked: list[tuple[str, str]], rng: random.Random) -> Source:
    chosen = asked[: rng.randint(1, MAX_QUESTIONS)]
    return conversation([(picture * (i == 0) + question, answer) for i, (question, answer) in enumerate(chosen)])


def _text_alone(document: Document) -> str:
    if any(not isinstance(element, TextElement) for element in parse_prompt(document.text)):
        raise SampleError("has_media", "only text can be set on pages")
    return plain_text(document.text)


def _choose_style(text: str, settings: PageConfig, rng: random.Random) -> PageStyle:
    from data_pipelines.text.fonts import choose_font

    if not text:
        raise SampleError("no_text", "there is no text in it")
    font = choose_font(rng, settings.fonts, text)
    width, size = rng.choice(settings.widths), rng.randint(*settings.letters)
    height = round(width * rng.choice((1.0, 1.25, 1.4)) / GRID) * GRID
    most = min(settings.columns, width // (16 * size)) if len(text) >= MANY_COLUMNS else 1
    columns = rng.randint(1, max(1, most))
    dark = rng.random() < 0.1
    ink, paper = rng.choice(INKS), rng.choice(PAPERS)
    ink, paper = (paper, ink) if dark else (ink, paper)
    return PageStyle(width, height, font, size, columns, ink, paper)


def _set(text: str, style: PageStyle) -> list[Page]:
    pages = list(paginate(wrap(text, style.column_width, measurer(style)), style))
    return balance(pages, style)


def _keep(
    picture: Image.Image, draft: Draft, settings: PageConfig, rng: random.Random, paper: tuple[int, int, int]
) -> Source:
    """Writes a picture, worn or not; returns its tag."""
    worn = rng.random() < settings.worn
    return image_tag(draft.save(*encode(wear(picture, rng, paper) if worn else picture, worn, rng)))


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, in order; a line end ends one, too."""
    found = (match.strip() for line in text.split("\n") for match in _SENTENCE.findall(line))
    return [sentence for sentence in found if sentence]


def page_questions(page: Page, columns: int, rng: random.Random, language: str) -> list[tuple[str, str]]:
    """Asks questions about a page and their answers, in an order that `rng` chooses: a line, how many, the next
    sentence.
    """
    lines = [line.text.strip() for _, _, line in page.lines]
    asked = []
    if columns == 1 and len(lines) >= 2:
        place = rng.randrange(min(len(lines), MAX_COUNTED) - 1)
        asked.append((_LINE[language].format(place + 1), lines[place]))
        asked.append((_LAST[language], lines[-1]))
        if len(lines) <= MAX_COUNTED:
            question, answer = _COUNT[language]
            asked.append((question, answer.format(len(lines))))
    whole = sentences(page.text)
    before = [i for i in range(len(whole) - 1) if whole.count(whole[i]) == 1]
    if before:
        place = rng.choice(before)
        asked.append((_NEXT[language].format(whole[place]), whole[place + 1]))
    rng.shuffle(asked)
    return asked


PAGES = SynthesisTask(
    NAME,
    "Pictures of text and of tables: OCR, question and interleaved documents from text, charts from tables.",
    add_arguments,
    make_job,
)
