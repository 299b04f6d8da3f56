"""What is asked about pages and charts, in English and Chinese; questions about the lines of a page."""

import random
import re

from data_pipelines.synthesis.pages.layout import Page

READ = {
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
_LINE = {"en": "What does line {} say?", "zh": "第{}行写的是什么？"}
_LAST = {"en": "What does the last line say?", "zh": "最后一行写的是什么？"}
_COUNT = {"en": ("How many lines of text are there?", "{} lines."), "zh": ("图中有多少行文字？", "{}行。")}
_NEXT = {"en": "Which sentence comes after “{}”?", "zh": "“{}”的后一句是什么？"}

MAX_COUNTED = 20  # lines that one can be asked to count
_SENTENCE = re.compile(r".+?(?:[.!?]+(?=\s|$)|[。！？]+[”’」』]?|$)")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; a line end ends one, too."""
    found = (match.strip() for line in text.split("\n") for match in _SENTENCE.findall(line))
    return [sentence for sentence in found if sentence]


def page_questions(page: Page, columns: int, rng: random.Random, language: str) -> list[tuple[str, str]]:
    """Questions about a page and their answers, in an order that `rng` chooses: a line, how many, the next sentence."""
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
