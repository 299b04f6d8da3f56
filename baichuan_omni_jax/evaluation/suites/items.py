"""Items of a suite, and the tables that they are read from: CSV, TSV, JSON lines and Parquet.

A table of a benchmark may be larger than memory (88,996 rows with their images as base64): items are made of the small
columns, and a row is read again, by its place in the file, when its media are asked for.
"""

import ast
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from baichuan_omni_jax.errors import ConfigError, RequestError
from baichuan_omni_jax.storage import refuse_stand_in

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RowError(ConfigError):
    """One row of a table cannot be an item; the message names it. The others can."""


_PIECE = 1 << 20  # bytes of a file that are hashed at a time


@dataclass(frozen=True)
class ItemMedia:
    """An image, a recording or a video of an item: a file, or what `read` gives when it is asked for."""

    kind: Literal["image", "audio", "video"]
    name: str
    path: Path | None = None
    read: Callable[[], bytes] | None = None

    def load(self) -> tuple[dict[str, Any], str]:
        """Reads it: the part of a message, and the SHA-256 of its bytes. Raises RequestError "bad_media"."""
        # Whatever the source does, a reader sees one error that names the item's file.
        try:
            if self.path is None:
                assert self.read is not None
                data = self.read()
                return {"type": self.kind, "bytes": data}, hashlib.sha256(data).hexdigest()
            # A pipe or a device would be read for ever.
            if self.path.exists() and not self.path.is_file():
                raise ValueError("it is a folder" if self.path.is_dir() else "it is no file")
            # In pieces: a film need not fit into memory beside the model.
            digest = hashlib.sha256()
            with self.path.open("rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        # Parquet has errors of its own, which are no ValueError where a kind of column is not known.
        except (OSError, ValueError, LookupError, NotImplementedError, csv.Error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise RequestError("bad_media", f"{self.name} cannot be read: {reason}") from error
        return {"type": self.kind, "path": str(self.path)}, digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a suite, as its files have it; how it is put to a model is the prompt builder's matter.

    Attributes:
        id: names it among all items of the suite.
        group: what scores are also given for: subset, subject, component.
        question: its text, "" where it is spoken only.
        options: of a multiple choice, in order.
        references: right answers: the letter of a choice, texts that count as right, or what is spoken.
        media: in the order of the message.
        context: text that stands before the question: a passage, a hint, a transcript.
        language: "en" or "zh".
        shots: solved questions of the same subject.
        problem: why it cannot be asked, as its row is damaged; "": it can.
    """

    id: str
    group: str
    question: str = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    media: tuple[ItemMedia, ...] = ()
    context: str = ""
    language: Literal["en", "zh"] = "en"
    shots: tuple["Item", ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: its values by column, where it stands, and how they are read again.

    Who keeps media for later keeps `again`, not the row.
    """

    values: Mapping[str, Any]
    where: str
    again: Callable[[], Mapping[str, Any]]

    def __getitem__(self, column: str) -> str:
        """The text of a column, "" where it is empty. Raises RowError where there is no such column."""
        if column not in self.values:
            raise RowError(f"{self.where} has no column {column!r}; it has {', '.join(map(str, self.values))}")
        value = self.values[column]
        # pandas writes a missing value as "nan" or leaves it out.
        return "" if value is None or value != value else _text_of(value)

    def get(self, column: str) -> str:
        """The text of a column, "" where there is none."""
        return self[column] if column in self.values else ""

    def list(self, column: str) -> tuple[str, ...]:
        """The texts of a column that holds a list: of its own, as JSON, or as Python writes it; else of one text."""
        value = self.values.get(column)
        if isinstance(value, list):
            return tuple(map(_text_of, value))
        # Tables write lists as JSON or as Python prints them, with either quotes.
        text = self[column]
        if text[:1] == "[" and text[-1:] == "]":
            for parse in (json.loads, ast.literal_eval):
                try:
                    return tuple(map(_text_of, parse(text)))
                # Brackets in a text are no list, and thousands of them no program.
                except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                    continue
        return (text,) if text else ()


def _text_of(value: object) -> str:
    """The text of a value. JSON may hold half a character, which neither a tokenizer nor a file takes."""
    return str(value).strip().encode("utf-8", "replace").decode("utf-8")


def items_of(
    rows: Iterable[Row], make: Callable[[int, Row], Item | None], group: Callable[[Row], str] = lambda row: "all"
) -> Iterator[Item]:
    """Makes the items of a table; a row that can be none is an item with its `problem`, and the others go on.

    Args:
        rows: as `read_table` yields them.
        make: from number, from 0, and row to the item; None: the row is none. What it raises as RowError is a problem.
        group: that of a row which cannot be asked.
    """
    for number, row in enumerate(rows):
        try:
            item = make(number, row)
        except RowError as error:
            item = Item(id=row.where, group=group(row), problem=str(error))
        if item is not None:
            yield item


def is_file(path: Path) -> bool:
    """Whether there is such a file: what a table names may be no name of a file at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def suite_folder(folder: Path) -> Path:
    """Returns the folder of a suite. Raises ConfigError where there is none, or nothing in it."""
    try:
        if not folder.is_dir():
            raise ConfigError(f"--data {folder} is no folder")
        if not any(folder.iterdir()):
            raise ConfigError(f"--data {folder} is empty")
    except OSError as error:
        raise ConfigError(f"--data {folder} cannot be read: {error.strerror or error}") from error
    return folder


def find_tables(folder: Path, *patterns: str) -> list[Path]:
    """Lists the files that match the first of the patterns that any file matches, by name.

    Raises ConfigError naming the patterns where none matches.
    """
    suite_folder(folder)
    # In order of preference: a data set may come in several forms at once.
    for pattern in patterns:
        if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return found
    raise ConfigError(f"--data {folder} holds no {' and no '.join(patterns)}")


def read_table(path: Path, columns: Sequence[str] = (), header: Sequence[str] = ()) -> Iterator[Row]:
    """Yields the rows of a table, by what its name ends in.

    Args:
        path: .csv, .tsv, .jsonl or .parquet.
        columns: those that must be there.
        header: the columns of a .csv whose first line is a row.

    Raises:
        ConfigError: the file cannot be read, is damaged, has no row, or lacks a column.
    """
    # A clone without Git LFS has pointers of the right names.
    refuse_stand_in(path)
    read = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix)
    if read is None:
        raise ConfigError(f"{path} is no .csv, .tsv, .jsonl or .parquet file")
    rows = _read_csv(path, header) if read is _read_csv else read(path)
    first = True
    try:
        for row in rows:
            # Once a table: the columns are the same in all rows, or the row's own access says what it lacks.
            if first and (missing := [name for name in columns if name not in row.values]):
                lacking = " and no ".join(f"column {name!r}" for name in missing)
                raise ConfigError(f"{path} has no {lacking}; it has {', '.join(map(str, row.values))}")
            first = False
            yield row
    except (OSError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    # A download that ended behind the header, or zeros: one subject of many would be missing without a word.
    if first:
        raise ConfigError(f"{path} has no row")


class _Lines:
    """The lines of a file as text, with the place where the next one begins. Raises ConfigError for other text."""

    def __init__(self, path: Path):
        self._path, self._file, self.place, self._number = path, path.open("rb"), 0, 0
        self.ended = False  # whether a line was asked for beyond the last one

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self._file.close()
            self.ended = True
            raise StopIteration
        self._number += 1
        try:
            text = line.decode("utf-8-sig" if not self.place else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._path}:{self._number} cannot be read, it is not UTF-8: {error}") from error
        self.place += len(line)
        return text


def _read_csv(path: Path, header: Sequence[str] = ()) -> Iterator[Row]:
    # Images as base64 are longer than the module's limit of a field.
    csv.field_size_limit(sys.maxsize)
    lines, mark = _Lines(path), "\t" if path.suffix == ".tsv" else ","
    reader = csv.reader(lines, delimiter=mark)
    names = list(header) or [name.strip() for name in next(reader, [])]
    while True:
        # A quoted value may hold line breaks: a row is as many lines as the reader took for it.
        start, first = lines.place, reader.line_num + 1
        cells = next(reader, None)
        if cells is None:
            return
        # A quotation mark that is never closed would make one value of all the rows behind it.
        if lines.ended:
            raise ConfigError(f"{path}:{first} has a quotation mark that the file does not close")
        if not any(cells):
            continue
        where = f"{path}:{reader.line_num}"
        if len(cells) > len(names):
            raise ConfigError(f"{where} has {len(cells)} values for {len(names)} columns")
        values = dict(zip(names, cells, strict=False))
        again = _CsvRow(path, start, lines.place - start, names)
        yield Row(values, where, again)


@dataclass(frozen=True)
class _CsvRow:
    """Reads one row of a CSV or TSV file again."""

    path: Path
    start: int
    size: int
    names: list[str]

    def __call__(self) -> Mapping[str, Any]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.size).decode("utf-8-sig")
        # Lines end as they did the first time: text knows more line ends than a file.
        lines = io.StringIO(text, newline="\n")
        cells = next(csv.reader(lines, delimiter="\t" if self.path.suffix == ".tsv" else ","), [])
        return dict(zip(self.names, cells, strict=False))


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_Lines(path), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}:{number} is no JSON object")
        yield Row(values, f"{path}:{number}", lambda values=values: values)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow: pip install '.[evaluate]'") from error
    try:
        file, number = pyarrow.parquet.ParquetFile(path), 0
        for group in range(file.num_row_groups):
            table = _row_group(path, group)
            for place in range(table.num_rows):
                number += 1
                again = _ParquetRow(path, group, place)
                yield Row(again(), f"{path}, row {number}", again)
    # A damaged file may say anything: of lengths, times and texts beyond all bounds.
    except (pyarrow.ArrowException, ValueError, LookupError, OverflowError, NotImplementedError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error


# Rows are asked for in their order, several at a time: two groups lie in memory.
@lru_cache(maxsize=2)
def _row_group(path: Path, group: int) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group)


@dataclass(frozen=True)
class _ParquetRow:
    """Reads one row of a Parquet file again."""

    path: Path
    group: int
    place: int

    def __call__(self) -> Mapping[str, Any]:
        return _row_group(self.path, self.group).slice(self.place, 1).to_pylist()[0]
