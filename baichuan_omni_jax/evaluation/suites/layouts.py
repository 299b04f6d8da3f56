"""Readers of the public layouts: a folder as it is downloaded becomes the items of a suite, in its order.

A reader looks at small columns alone. Media that are missing or damaged are found when an item is asked, and cost that
item; a missing column, or an empty folder, is refused before the first one.
"""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.items import LETTERS, Item, ItemMedia, Row, find_tables, read_table
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
        for number, row in enumerate(read_table(table, columns)):
            name = row["audio_filename"]
            audio = ItemMedia("audio", f"{subset}/{name}", root / subset / "audios" / name)
            references = row.list(answer) if answer else ()
            yield Item(
                id=f"{subset}/{number}",
                group=subset,
                question=row[question],
                references=references,
                media=(audio,),
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
    for row in read_table(table, ("index", "question", "A", "B", "answer")):
        if "image" not in row.values and "image_path" not in row.values:
            raise ConfigError(f"{table} has neither a column 'image' nor 'image_path'")
        sources[row["index"]] = row.again
        if not row["answer"]:
            continue
        options = tuple(row.get(letter) for letter in LETTERS[:12])
        # Options end at the first empty one: other rows may have more.
        count = next((n for n, text in enumerate(options) if not text), len(options))
        yield Item(
            id=row["index"],
            group=row.get("category") or "all",
            question=row["question"],
            options=options[:count],
            references=(row["answer"].upper(),),
            media=tuple(_images(row, folder, sources)),
            context=row.get("hint"),
        )


def _images(row: Row, folder: Path, sources: Mapping[str, Callable[[], Mapping[str, Any]]]) -> Iterator[ItemMedia]:
    """Yields the images of a VLMEvalKit row; `sources` reads rows again, by their index."""
    images, name = row.list("image") if "image" in row.values else (), f"row {row['index']}"
    if not images:
        for file in row.list("image_path"):
            # As its own tools do: below the folder `images` beside the table, or below the table's.
            path = folder / "images" / file
            yield ItemMedia("image", f"{name}: {file}", path if path.is_file() else folder / file)
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
    for table in tables:
        for row in read_table(table, columns):
            # The answer is told as its text: the letter is its place.
            options = row.list("options")
            if row["answer"] not in options:
                raise ConfigError(f"{row.where}: its answer {row['answer']!r} is none of its options")
            # What is not looked at or listened to is told.
            told, media = [], []
            for kind, told_as in _OMNI_TOLD.items():
                if kind in setting:
                    media.append(_omni_media(row, kind, folder))
                else:
                    told.append(f"{told_as}: {row[f'{kind} content']}")
            yield Item(
                id=row["index"],
                group=row.get("audio type") or row.get("task type") or "all",
                question=row["question"],
                options=options,
                references=(LETTERS[options.index(row["answer"])],),
                media=tuple(media),
                context="\n".join(told),
            )


def _omni_media(row: Row, kind: Literal["image", "audio"], folder: Path) -> ItemMedia:
    """The image or audio of a row of OmniBench: inside it, or the file that it names."""
    if f"{kind}_path" in row.values:
        name = row[f"{kind}_path"]
        return ItemMedia(kind, f"item {row['index']}: {name}", folder / "mm_data" / kind / name)
    if kind not in row.values:
        raise ConfigError(f"{row.where} has neither a column {kind!r} nor '{kind}_path'")
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
    for table in find_tables(folder, "**/*.parquet", "*.jsonl", "*.tsv", "*.csv"):
        for number, row in enumerate(read_table(table, ("videoID", "question", "options", "answer"))):
            name = f"{row['videoID']}.mp4"
            # Its archive unpacks to `data`; mirrors say `video` or `videos`.
            places = [folder / place / name for place in ("data", "video", "videos")]
            # Options carry their letter: "A. Two."
            options = tuple(text[2:].strip() if text[1:2] in ".)" else text for text in row.list("options"))
            yield Item(
                id=row.get("question_id") or f"{table.stem}/{number}",
                group=row.get("duration") or "all",
                question=row["question"],
                options=options,
                references=(row["answer"].upper(),),
                media=(ItemMedia("video", name, next((path for path in places if path.is_file()), places[0])),),
            )


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
        shots = tuple(_exam_items(solved[0], subject, language)) if solved else ()
        for item in _exam_items(table, subject, language):
            yield Item(**{**vars(item), "shots": shots[:5]})


_EXAM = ("question", "A", "B", "C", "D", "answer")


def _exam_items(table: Path, subject: str, language: Literal["en", "zh"]) -> Iterator[Item]:
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    # A header names the options; a line that ends in a letter alone, and names none, is a row.
    headed = {"a", "b", "c", "d"} <= {name.strip().strip('"').lower() for name in first.split(",")}
    for number, row in enumerate(read_table(table, header=() if headed else _EXAM)):
        named = Row({_exam_name(name): value for name, value in row.values.items()}, row.where, row.again)
        answer = named["answer"].upper()
        if answer not in ("A", "B", "C", "D"):
            raise ConfigError(f"{row.where}: its answer {answer!r} is none of A, B, C, D")
        options = tuple(named[letter] for letter in "ABCD")
        question = named["question"]
        yield Item(
            id=f"{subject}/{number}",
            group=subject,
            question=question,
            options=options,
            references=(answer,),
            language=language,
        )


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
        for number, row in enumerate(read_table(table, ("question", "options", "label"))):
            # Some releases write a list of one letter.
            label = row["label"].strip("[]'\" ").upper()
            options = tuple(_option_text(text) for text in row.list("options"))
            if len(label) != 1 or label not in LETTERS[: len(options)]:
                raise ConfigError(f"{row.where}: its label {row['label']!r} is no letter of its {len(options)} options")
            yield Item(
                id=f"{table.stem}/{number}",
                group=table.stem,
                question=row["question"],
                options=options,
                references=(label,),
                context=row.get("passage"),
                language="zh" if chinese and table.stem != "gaokao-english" else "en",
            )


def _option_text(text: str) -> str:
    """An option without the letter that it begins with: `(A)7` is 7."""
    return text[3:].strip() if text[:1] in "(（" and text[2:3] in ")）" else text


def read_recordings(folder: Path, language: Literal["en", "zh"] = "en") -> Iterator[Item]:
    """Reads recordings with their transcripts, in the layout that is there:

    LibriSpeech's `SPEAKER/CHAPTER/*.trans.txt` beside the clips; Kaldi's `text` and `wav.scp`; AISHELL's
    `transcript/*.txt` and `wav/test`; FLEURS' `test.tsv` and `audio/test`.
    """
    _folder(folder)
    found = (
        (path for path in sorted(folder.glob(pattern)))
        for pattern in ("**/*.trans.txt", "text", "transcript/*.txt", "test.tsv")
    )
    tables = next((paths for paths in map(list, found) if paths), [])
    if not tables:
        raise ConfigError(
            f"--data {folder} holds no *.trans.txt (LibriSpeech), text with wav.scp (Kaldi), transcript/*.txt "
            "(AISHELL) and no test.tsv (FLEURS)"
        )
    for table in tables:
        yield from _fleurs(table, language) if table.suffix == ".tsv" else _transcribed(table, folder, language)


def _transcribed(table: Path, folder: Path, language: Literal["en", "zh"]) -> Iterator[Item]:
    """Yields the items of a table of `NAME TRANSCRIPT` lines, whose clips lie where the layout says."""
    # LibriSpeech's clips lie beside their table, Kaldi's where `wav.scp` says, AISHELL's in a tree of speakers.
    places: dict[str, Path] = {}
    if table.name == "text":
        for line in _lines(folder / "wav.scp"):
            name, _, place = line.partition(" ")
            places[name] = Path(place) if Path(place).is_absolute() else folder / place
    elif table.parent.name == "transcript":
        # The table has the transcripts of all splits: those count whose clips are there.
        places = {path.stem: path for path in sorted((folder / "wav" / "test").glob("**/*.wav"))}
    for line in _lines(table):
        name, _, spoken = line.partition(" ")
        if table.parent.name == "transcript" and name not in places:
            continue
        clip = places.get(name) or _beside(table, name)
        # LibriSpeech's own folder holds several sets, each SPEAKER/CHAPTER/TABLE.
        parts = table.relative_to(folder).parts
        group = parts[0] if len(parts) > 3 else "all"
        media = (ItemMedia("audio", clip.name, clip),)
        yield Item(id=name, group=group, references=(spoken.strip(),), media=media, language=language)


def _beside(table: Path, name: str) -> Path:
    clips = [table.parent / f"{name}{end}" for end in (".flac", ".wav", ".mp3")]
    return next((clip for clip in clips if clip.is_file()), clips[0])


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _fleurs(table: Path, language: Literal["en", "zh"]) -> Iterator[Item]:
    # Its tables have no header: number, file, text as written, text in small letters, ...
    for number, line in enumerate(_lines(table), 1):
        cells = line.split("\t")
        if len(cells) < 4:
            raise ConfigError(f"{table}:{number} has {len(cells)} columns, not those of FLEURS")
        clip = table.parent / "audio" / "test" / cells[1]
        media = (ItemMedia("audio", cells[1], clip),)
        yield Item(id=str(number), group="all", references=(cells[2],), media=media, language=language)


def read_texts_to_speak(folder: Path, language: Literal["en", "zh"] = "en") -> Iterator[Item]:
    """Reads Seed-TTS-eval's `meta.lst`: `NAME|PROMPT TEXT|PROMPT WAV|TEXT[|WAV]`; the text is what is to be spoken."""
    for table in find_tables(folder, f"{language}/meta.lst", "meta.lst"):
        for number, line in enumerate(_lines(table), 1):
            cells = line.split("|")
            if len(cells) < 4:
                raise ConfigError(f"{table}:{number} has {len(cells)} fields, not NAME|TEXT|WAV|TEXT")
            text = cells[3].strip()
            yield Item(id=cells[0], group="all", question=text, references=(text,), language=language)
