"""Readers of the public layouts: a folder as it is downloaded becomes the items of a suite, in its order.

A reader looks at small columns alone. Media that are missing or damaged are found when an item is asked, and cost that
item, as does a row that can be none; a missing column, or an empty folder, is refused before the first one.
"""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.items import (
    LETTERS,
    Item,
    ItemMedia,
    Row,
    RowError,
    find_tables,
    is_file,
    items_of,
    read_table,
)
from baichuan_omni_jax.evaluation.suites.items import suite_folder as _folder

# OpenAudioBench: subset -> the columns of its questions and of its right answers.
AUDIO_SUBSETS = {
    "alpaca_eval": ("instruction", None),
    "llama_questions": ("Questions", "Answer"),
    "reasoning_qa": ("Prompt", "参考答案"),
    "trivia_qa": ("question", "answer_normalized_aliases"),
    "web_questions": ("question", "answers"),
}
Setting = Literal["image-audio", "caption-audio", "image-transcript", "caption-transcript"]
_OMNI_TOLD: dict[Literal["image", "audio"], str] = {"image": "Picture", "audio": "Audio"}
_REFERENCE = 64  # characters
# AGIEval's tasks whose answers are letters, each one letter: the others are cloze, or have several right letters.
_AGIEVAL_OPEN = ("gaokao-mathcloze", "math", "gaokao-physics", "jec-qa-kd", "jec-qa-ca")


def read_open_audio_bench(folder: Path) -> Iterator[Item]:
    """Reads `eval_datas/SUBSET/SUBSET.csv` with `audios/*.mp3` beside it; the subsets that are there."""
    # The folder as it is downloaded, or its inner one; a user may keep some subsets alone.
    root = folder / "eval_datas" if (folder / "eval_datas").is_dir() else folder
    subsets = [name for name in AUDIO_SUBSETS if (root / name).is_dir()]
    if not subsets:
        _folder(folder)
        raise ConfigError(f"--data {folder} holds none of the folders eval_datas/{{{','.join(AUDIO_SUBSETS)}}}")
    for subset in subsets:
        (table,) = find_tables(root / subset, f"{subset}.csv")
        question, answer = AUDIO_SUBSETS[subset]
        columns = ["audio_filename", question, *([answer] if answer else [])]
        make = partial(_spoken_question, root / subset, question, answer)
        yield from items_of(read_table(table, columns), make, lambda row, subset=subset: subset)


def _spoken_question(folder: Path, question: str, answer: str | None, number: int, row: Row) -> Item:
    subset, name = folder.name, row["audio_filename"]
    return Item(
        id=f"{subset}/{number}",
        group=subset,
        question=row[question],
        references=row.list(answer) if answer else (),
        media=(ItemMedia("audio", f"{subset}/{name}", folder / "audios" / name),),
        language="zh" if subset == "reasoning_qa" else "en",
    )


def read_image_choice(folder: Path) -> Iterator[Item]:
    """Reads a TSV of VLMEvalKit: `index`, `question`, `A`, `B`, ..., `answer`, `category`, and `image` (base64) or
    `image_path`, each one or a list. A short `image` is the index of the row that holds it.

    The group is `category`; rows without an answer (a split that is not public) are left out.
    """
    (table, *more) = find_tables(folder, "*.tsv")
    if more:
        raise ConfigError(f"--data {folder} holds several tables, {table.name} and {more[0].name}: leave one there")
    sources: dict[str, Callable[[], Mapping[str, Any]]] = {}
    group = _group_by("category")

    def make(number: int, row: Row) -> Item | None:
        if "image" not in row.values and "image_path" not in row.values:
            raise RowError(f"{row.where} has neither a column 'image' nor 'image_path'")
        sources[row["index"]] = row.again
        if not row["answer"]:
            return None
        options = tuple(row.get(letter) for letter in LETTERS[:12])
        # Options end at the first empty one: other rows may have more.
        count = next((n for n, text in enumerate(options) if not text), len(options))
        return Item(
            id=row["index"],
            group=group(row),
            question=row["question"],
            options=options[:count],
            references=(_letter(row, "answer", count),),
            media=tuple(_images(row, folder, sources)),
            context=row.get("hint"),
        )

    yield from items_of(read_table(table, ("index", "question", "A", "B", "answer")), make, group)


def _group_by(*columns: str) -> Callable[[Row], str]:
    """Returns what names a row's group: the first of the columns that has something."""
    return lambda row: next((row.get(column) for column in columns if row.get(column)), "all")


def _letter(row: Row, column: str, options: int) -> str:
    """The letter of the right one of so many options. Raises RowError where there is none: no answer could be right."""
    # Some releases write a list of one letter.
    letter = row[column].strip("[]'\" ").upper()
    if len(letter) != 1 or letter not in LETTERS[:options]:
        raise RowError(f"{row.where}: its {column} {row[column]!r} is no letter of its {options} options")
    return letter


def _images(row: Row, folder: Path, sources: Mapping[str, Callable[[], Mapping[str, Any]]]) -> Iterator[ItemMedia]:
    """Yields the images of a VLMEvalKit row; `sources` reads rows again, by their index."""
    images, name = row.list("image") if "image" in row.values else (), f"row {row['index']}"
    if not images:
        for file in row.list("image_path"):
            # As its own tools do: below the folder `images` beside the table, or below the table's.
            path = folder / "images" / file
            yield ItemMedia("image", f"{name}: {file}", path if is_file(path) else folder / file)
        return
    # A short text is the index of an earlier row that has the image: base64 of one is longer.
    again = sources.get(images[0], row.again) if len(images[0]) <= _REFERENCE else row.again
    for number in range(len(images)):
        yield ItemMedia("image", f"{name}: image {number + 1}", read=partial(_decode_image, again, number))


def _decode_image(again: Callable[[], Mapping[str, Any]], number: int) -> bytes:
    try:
        return base64.b64decode(Row(again(), "", again).list("image")[number], validate=True)
    except (binascii.Error, IndexError) as error:
        raise ValueError(f"its base64 is damaged ({error})") from error


def read_omni_bench(folder: Path, setting: Setting = "image-audio") -> Iterator[Item]:
    """Reads OmniBench: Parquet with `image` and `audio` inside, or JSON lines beside `mm_data/{image,audio}`.

    `setting` says what stands in for which of the two: the caption for the image, the transcript for the audio.
    """
    tables = find_tables(folder, "**/*.parquet", "**/*.jsonl")
    columns = ("index", "question", "options", "answer", "image content", "audio content")
    group = _group_by("audio type", "task type")

    def make(number: int, row: Row) -> Item:
        # The answer is told as its text: the letter is its place.
        options = row.list("options")[: len(LETTERS)]
        if row["answer"] not in options:
            raise RowError(f"{row.where}: its answer {row['answer']!r} is none of its options")
        # What is not looked at or listened to is told.
        told, media = [], []
        for kind, told_as in _OMNI_TOLD.items():
            if kind in setting:
                media.append(_omni_media(row, kind, folder))
            else:
                told.append(f"{told_as}: {row[f'{kind} content']}")
        return Item(
            id=row["index"],
            group=group(row),
            question=row["question"],
            options=options,
            references=(LETTERS[options.index(row["answer"])],),
            media=tuple(media),
            context="\n".join(told),
        )

    for table in tables:
        yield from items_of(read_table(table, columns), make, group)


def _omni_media(row: Row, kind: Literal["image", "audio"], folder: Path) -> ItemMedia:
    """The image or audio of a row of OmniBench: inside it, or the file that it names."""
    if f"{kind}_path" in row.values:
        name = row[f"{kind}_path"]
        return ItemMedia(kind, f"item {row['index']}: {name}", folder / "mm_data" / kind / name)
    if kind not in row.values:
        raise RowError(f"{row.where} has neither a column {kind!r} nor '{kind}_path'")
    return ItemMedia(kind, f"item {row['index']}: {kind}", read=partial(_embedded, row.again, kind))


def _embedded(again: Callable[[], Mapping[str, Any]], column: str) -> bytes:
    value = again()[column]
    value = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(value, bytes) or not value:
        raise ValueError("there are no bytes in it")
    return value


def read_video_choice(folder: Path) -> Iterator[Item]:
    """Reads the layout of Video-MME: a table (Parquet, JSON lines, CSV or TSV) with `videoID`, `question`, `options`
    and `answer`, and `data/VIDEOID.mp4` or `video/VIDEOID.mp4`. The group is `duration`.
    """
    group = _group_by("duration")

    def make(table: Path, number: int, row: Row) -> Item:
        name = f"{row['videoID']}.mp4"
        # Its archive unpacks to `data`; mirrors say `video` or `videos`.
        places = [folder / place / name for place in ("data", "video", "videos")]
        options = _plain_options(row.list("options"))
        return Item(
            id=row.get("question_id") or f"{table.stem}/{number}",
            group=group(row),
            question=row["question"],
            options=options,
            references=(_letter(row, "answer", len(options)),),
            media=(ItemMedia("video", name, next((path for path in places if is_file(path)), places[0])),),
        )

    columns = ("videoID", "question", "options", "answer")
    for table in find_tables(folder, "**/*.parquet", "*.jsonl", "*.tsv", "*.csv"):
        yield from items_of(read_table(table, columns), partial(make, table), group)


def read_exam(folder: Path, split: str = "test", language: Literal["en", "zh"] = "en") -> Iterator[Item]:
    """Reads MMLU, CMMLU and C-Eval: a CSV a subject in the folders of its splits, solved questions in `dev`.

    Args:
        folder: with `dev` and `split`, or with a folder `data` that has them.
        split: whose questions are asked; C-Eval's public answers are those of `val`.
        language: of the questions.

    Yields:
        The items; the group is the subject. MMLU's tables have no header, the others have one in their own spelling.
    """
    root = folder / "data" if (folder / "data").is_dir() else folder
    tables = find_tables(root, f"{split}/*.csv")
    for table in tables:
        subject = table.stem.removesuffix(f"_{split}")
        # MMLU and C-Eval say the split in the name too, CMMLU in the folder alone.
        solved = [path for path in (root / "dev" / f"{subject}{end}.csv" for end in ("_dev", "")) if path.is_file()]
        shots = [shot for shot in _exam_items(solved[0], subject, language) if not shot.problem] if solved else []
        for item in _exam_items(table, subject, language):
            yield replace(item, shots=tuple(shots[:5]))


_EXAM = ("question", "A", "B", "C", "D", "answer")


def _exam_items(table: Path, subject: str, language: Literal["en", "zh"]) -> Iterator[Item]:
    try:
        with table.open(encoding="utf-8-sig", errors="replace") as file:
            first = file.readline()
    except OSError as error:
        raise ConfigError(f"{table} cannot be read: {error.strerror or error}") from error
    # A header names the options; a line that ends in a letter alone, and names none, is a row.
    headed = {"a", "b", "c", "d"} <= {name.strip().strip('"').lower() for name in first.split(",")}

    def make(number: int, row: Row) -> Item:
        named = Row({_exam_name(name): value for name, value in row.values.items()}, row.where, row.again)
        return Item(
            id=f"{subject}/{number}",
            group=subject,
            question=named["question"],
            options=tuple(named[letter] for letter in "ABCD"),
            references=(_letter(named, "answer", 4),),
            language=language,
        )

    yield from items_of(read_table(table, header=() if headed else _EXAM), make, lambda row: subject)


def _exam_name(name: str) -> str:
    return name.strip() if len(name.strip()) == 1 else name.strip().lower()


def read_agieval(folder: Path) -> Iterator[Item]:
    """Reads AGIEval's `data/v1/TASK.jsonl` (`passage`, `question`, `options`, `label`): its tasks of one right letter.

    Cloze tasks and those with several right letters cannot be chosen by a letter's likelihood and are left out.
    """
    root = next((path for path in (folder / "data" / "v1", folder / "v1", folder) if path.is_dir()), folder)
    for table in find_tables(root, "*.jsonl", "test/*.jsonl"):
        if table.stem in _AGIEVAL_OPEN:
            continue
        # Tasks say their language by their name alone.
        chinese = table.stem.startswith("gaokao") or table.stem.endswith("-zh")
        make = partial(_agieval_item, table.stem, "zh" if chinese and table.stem != "gaokao-english" else "en")
        rows = read_table(table, ("question", "options", "label"))
        yield from items_of(rows, make, lambda row, task=table.stem: task)


def _agieval_item(task: str, language: Literal["en", "zh"], number: int, row: Row) -> Item:
    options = _plain_options(row.list("options"))
    return Item(
        id=f"{task}/{number}",
        group=task,
        question=row["question"],
        options=options,
        references=(_letter(row, "label", len(options)),),
        context=row.get("passage"),
        language=language,
    )


def _plain_options(texts: Sequence[str]) -> tuple[str, ...]:
    """Options without the letters that they begin with: `(A)7` and `A. 7` at the first place are 7."""
    return tuple(
        re.sub(rf"^(?:[(（]{letter}[)）]|{letter}[.)])", "", text).strip()
        for letter, text in zip(LETTERS, texts, strict=False)
    )
