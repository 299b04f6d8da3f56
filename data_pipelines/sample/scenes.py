"""Captions, questions and answers about crops and videos, in English and Chinese, true by what photographs.py knows."""

import random

from data_pipelines.sample.media import VideoPlan, view
from data_pipelines.sample.photographs import (
    Crop,
    absent_parts,
    brightness,
    dominant_color,
    orientation,
    place,
    visible_parts,
)

Answer = tuple[str, str]
"""A question and its answer."""

NOUNS = {
    "sky": ("the sky", "天空"),
    "tower": ("a Chinese tower", "一座中式楼阁"),
    "roof": ("a tiled roof", "瓦片屋顶"),
    "windows": ("a row of windows", "一排窗户"),
    "lake": ("a calm lake", "平静的湖水"),
    "trees": ("trees", "树木"),
    "flower": ("a large flower", "一朵大花"),
    "heart": ("the heart of the flower", "花心"),
    "bloom": ("a second flower", "第二朵花"),
    "bud": ("a small bud", "一个小花苞"),
    "leaves": ("blurred dark leaves", "模糊的深色叶子"),
}
COLORS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "teal": "青色",
    "blue": "蓝色",
    "brown": "棕色",
    "white": "白色",
    "grey": "灰色",
    "black": "黑色",
}
LIGHT = {"bright": ("bright", "明亮"), "medium": ("of medium brightness", "明暗适中"), "dark": ("dark", "昏暗")}
SHAPES = {"wide": ("wide", "横的"), "tall": ("tall", "竖的"), "square": ("square", "方的")}
PLACES = [
    [("at the top left", "左上方"), ("at the top", "上方"), ("at the top right", "右上方")],
    [("on the left", "左边"), ("in the middle", "中间"), ("on the right", "右边")],
    [("at the bottom left", "左下方"), ("at the bottom", "下方"), ("at the bottom right", "右下方")],
]
MOVES = {
    "right": ("pans to the right", "向右移动"),
    "left": ("pans to the left", "向左移动"),
    "up": ("moves up", "向上移动"),
    "down": ("moves down", "向下移动"),
    "in": ("zooms in", "慢慢拉近"),
    "out": ("zooms out", "慢慢拉远"),
}


def _language(language: str) -> int:
    return ("en", "zh").index(language)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def known(part: str, language: str) -> str:
    """Returns the noun of a part already spoken of: `a calm lake` -> `the calm lake`, `一朵大花` -> `大花`."""
    # The indefinite article of first mention goes: 一 with its measure word, or "a".
    noun = NOUNS[part][_language(language)]
    if language == "zh":
        return noun[2:] if noun.startswith("一") else noun  # 一 and its measure word
    return "the " + noun.removeprefix("a ").removeprefix("the ")


def listing(parts: list[str], language: str) -> str:
    """`the sky, a calm lake and trees`, `天空、平静的湖水和树木`."""
    nouns = [NOUNS[part][_language(language)] for part in parts]
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(nouns[:-1]) + last + nouns[-1] if len(nouns) > 1 else nouns[0]


def caption(rng: random.Random, crop: Crop, language: str) -> str:
    """Describes what a crop shows, in one to three sentences."""
    parts = visible_parts(crop)
    thing = listing(parts[:3], language)
    kind = orientation(crop)
    if language == "en":
        article = "A black and white" if crop.gray else f"A {kind}"
        first = rng.choice([f"{article} picture of {thing}.", f"{article} photo that shows {thing}."])
    else:
        article = "黑白" if crop.gray else SHAPES[kind][1]
        first = rng.choice([f"一张{article}照片，拍的是{thing}。", f"这张{article}图片里有{thing}。"])
    # One or two more sentences, each true of the crop; one that says nothing of it is left out.
    extra = rng.sample([_place_sentence, _color_sentence, _light_sentence], rng.choice([1, 1, 2]))
    joint = " " if language == "en" else ""
    return joint.join(filter(None, [first, *(sentence(crop, language) for sentence in extra)]))


def _place_sentence(crop: Crop, language: str) -> str:
    """Says where a part is; empty where no part of the crop has a place of its own."""
    part, where = _placed(crop)
    if not part:
        return ""
    noun, where = known(part, language), where[_language(language)]
    return f"{noun}在{where}。" if language == "zh" else f"{_capital(noun)} {_be(part)} {where}."


def _placed(crop: Crop) -> tuple[str, tuple[str, str]]:
    """Returns the largest part that has a place, and the place's names; empty strings when there is none."""
    # The most prominent part that has a place: backgrounds have none.
    for part in visible_parts(crop):
        spot = place(crop, part)
        if spot:
            return part, PLACES[spot[0]][spot[1]]
    return "", ("", "")


def _be(part: str) -> str:
    return "are" if part in ("trees", "leaves") else "is"


def _color_sentence(crop: Crop, language: str) -> str:
    color = dominant_color(crop)
    return f"The main colour is {color}." if language == "en" else f"主要颜色是{COLORS[color]}。"


def _light_sentence(crop: Crop, language: str) -> str:
    light = LIGHT[brightness(crop)][_language(language)]
    return f"The picture is {light}." if language == "en" else f"画面{light}。"


def short_caption(crop: Crop, language: str, limit: int = 2) -> str:
    """Writes one sentence that can be spoken in a few seconds."""
    thing = listing(visible_parts(crop)[:limit], language)
    return f"This picture shows {thing}." if language == "en" else f"这张图片里有{thing}。"


def questions(crop: Crop, language: str) -> list[Answer]:
    """Asks every question of this module whose answer is known for the crop; they also speak well."""
    # What is known of the crop; a question is asked only where its answer is certain.
    here, absent = visible_parts(crop), absent_parts(crop)
    light, (part, where) = LIGHT[brightness(crop)], _placed(crop)
    shape, color = orientation(crop), dominant_color(crop)
    subject = known(part, language) if part else ""
    if language == "zh":
        found = [
            ("图片里有什么？", f"图片里有{listing(here[:3], 'zh')}。"),
            ("这张图片的主要颜色是什么？", f"主要颜色是{COLORS[color]}。"),
            ("画面是亮还是暗？", f"画面{light[1]}。"),
            ("这张照片是横的、竖的还是方的？", f"这张照片是{SHAPES[shape][1]}。"),
            ("这是彩色照片吗？", "不是，是黑白照片。" if crop.gray else "是的，是彩色照片。"),
        ]
        found += [(f"{subject}在哪里？", f"{subject}在画面的{where[1]}。")] if part else []
        found += [(f"图片里有{known(part, 'zh')}吗？", f"有，图片里有{NOUNS[part][1]}。") for part in here[:2]]
        found += [(f"能看到{known(part, 'zh')}吗？", f"没有，看不到{known(part, 'zh')}。") for part in absent[:2]]
        return found
    found = [
        ("What is in the picture?", f"I see {listing(here[:3], 'en')}."),
        ("What is the main colour of this picture?", f"The main colour is {color}."),
        ("Is the picture bright or dark?", f"The picture is {light[0]}."),
        ("Is this photo wide, tall or square?", f"The photo is {SHAPES[shape][0]}."),
        ("Is this a colour photo?", "No, it is black and white." if crop.gray else "Yes, it is in colour."),
    ]
    if part:
        be = _be(part)
        found.append((f"Where in the picture {be} {subject}?", f"{_capital(subject)} {be} {where[0]}."))
    found += [(f"Can you see {NOUNS[part][0]}?", f"Yes, I can see {NOUNS[part][0]}.") for part in here[:2]]
    found += [(f"Can you see {NOUNS[part][0]}?", f"No, I cannot see {NOUNS[part][0]}.") for part in absent[:2]]
    return found


def video_caption_text(video: VideoPlan, language: str) -> str:
    """Describes what a video shows from its first picture to its last; short enough to be its spoken track."""
    first, last = visible_parts(video.first)[:2], visible_parts(video.last)[:2]
    if video.move == "cut":
        if language == "zh":
            return f"先是{listing(first[:1], 'zh')}，然后是{listing(last[:1], 'zh')}。"
        return f"First we see {listing(first[:1], 'en')}, then {listing(last[:1], 'en')}."
    # A move is told by what it passes or, where the ends differ, by where it begins and ends.
    move = MOVES[video.move][_language(language)]
    if first[0] == last[0]:
        # A pan that ends as it began has passed over something else.
        between = [part for part in visible_parts(view(video, 0.5))[:2] if part not in first]
        thing = listing((first[:1] + between + first[1:])[:2], language)
        return f"镜头{move}，我们看到{thing}。" if language == "zh" else f"The camera {move} and shows {thing}."
    start, end = known(first[0], language), listing(last[:1], language)
    return f"镜头{move}，从{start}到{end}。" if language == "zh" else f"The camera {move}, from {start} to {end}."


def video_questions(video: VideoPlan, language: str) -> list[Answer]:
    """Asks questions about time and movement in a video, with their answers."""
    first, last = listing(visible_parts(video.first)[:1], language), listing(visible_parts(video.last)[:1], language)
    # A cut is no move: the answer says so.
    cut = video.move == "cut"
    if language == "zh":
        move = "镜头没有移动，画面切换了一次。" if cut else f"镜头{MOVES[video.move][1]}。"
        return [
            ("镜头怎么移动？", move),
            ("视频开头是什么？", f"开头是{first}。"),
            ("视频最后出现什么？", f"最后是{last}。"),
            ("视频里发生了什么？", video_caption_text(video, "zh")),
        ]
    move = "It does not move, the picture changes once." if cut else f"The camera {MOVES[video.move][0]}."
    return [
        ("How does the camera move?", move),
        ("What comes first in the video?", f"First we see {first}."),
        ("What is seen at the end of the video?", f"At the end we see {last}."),
        ("What happens in this video?", video_caption_text(video, "en")),
    ]
