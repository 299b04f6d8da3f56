"""Readers of the public layouts of recordings with their transcripts, and of texts that are to be spoken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.suites.items import Item, ItemMedia, find_tables, is_file, suite_folder
from baichuan_omni_jax.storage import refuse_stand_in


def read_recordings(folder: Path, language: Literal["en", "zh"] = "en") -> Iterator[Item]:
    """Reads recordings with their transcripts, in the layout that is there:

    LibriSpeech's `SPEAKER/CHAPTER/*.trans.txt` beside the clips; Kaldi's `text` and `wav.scp`; AISHELL's
    `transcript/*.txt` and `wav/test`; FLEURS' `test.tsv` and `audio/test`.
    """
    suite_folder(folder)
    found = (
        (path for path in sorted(folder.glob(pattern)) if path.is_file())
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
            name, place = _name_and_rest(line)
            places[name] = Path(place) if Path(place).is_absolute() else folder / place
    elif table.parent.name == "transcript":
        # The table has the transcripts of all splits: those count whose clips are there.
        places = {path.stem: path for path in sorted((folder / "wav" / "test").glob("**/*.wav"))}
    for line in _lines(table):
        name, spoken = _name_and_rest(line)
        if table.parent.name == "transcript" and name not in places:
            continue
        clip = places.get(name) or _beside(table, name)
        # LibriSpeech's own folder holds several sets, each SPEAKER/CHAPTER/TABLE.
        parts = table.relative_to(folder).parts
        group = parts[0] if len(parts) > 3 else "all"
        media = (ItemMedia("audio", clip.name, clip),)
        yield Item(id=name, group=group, references=(spoken,), media=media, language=language)


def _beside(table: Path, name: str) -> Path:
    clips = [table.parent / f"{name}{end}" for end in (".flac", ".wav", ".mp3")]
    return next((clip for clip in clips if is_file(clip)), clips[0])


def _name_and_rest(line: str) -> tuple[str, str]:
    """Splits at the first white space: Kaldi's own tables have tabs as well."""
    name, *rest = line.split(maxsplit=1)
    return name, rest[0].strip() if rest else ""


def _lines(path: Path) -> list[str]:
    # A clone without Git LFS has pointers of the right names.
    refuse_stand_in(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    # Text knows more line ends than a file; Windows' are white space at the end.
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


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
