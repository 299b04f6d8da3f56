"""Text cut at punctuation into pieces to be spoken or written: Chinese and English rules.

The pieces joined are the text, white space included. A piece is cut after its punctuation, the quotes and brackets that
close behind it, and the white space that follows. No cut falls inside a number (3.14, 1,000), behind an abbreviation
(Dr., e.g., U.S.) or inside quotes, unless a piece would be longer than asked without it.
"""

import re
from collections.abc import Iterator
from functools import partial

from data_pipelines.synthesis.languages import HAN

_CHINESE_STOPS = "。！？；，…"
_ENGLISH_STOPS = ".!?;,"
_SENTENCE_ENDS = "。！？….!?\n"
_CLOSING = "\"'”’」』》）)]】"
_OPEN_QUOTES = {"“": "”", "「": "」", "『": "』", "《": "》"}
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon st jr sr vs etc approx dept est fig no vol pp ed eds al inc ltd co corp "
    "e.g i.e cf a.m p.m u.s u.k u.n d.c b.c a.d ph.d jan feb mar apr jun jul aug sept sep oct nov dec".split()
)
_LETTER = re.compile(r"[^\W\d_]")
_FOLLOWING = re.compile(r"\s*(\S)")
_SPOKEN = re.compile(r"[^\W_]")

HAN_SECONDS, OTHER_SECONDS = 0.25, 0.07
"""What a Chinese character, and any other letter or digit, take when they are spoken."""

_QUOTED, _CLAUSE, _SENTENCE = range(3)  # what a break ends: something inside quotes, a clause, a sentence


def spoken_seconds(text: str) -> float:
    """About how long the text is when spoken; punctuation and white space take no time.

    >>> spoken_seconds("湖水很平静。"), spoken_seconds("!?")
    (1.25, 0.0)
    """
    han = len(HAN.findall(text))
    return HAN_SECONDS * han + OTHER_SECONDS * (len(_SPOKEN.findall(text)) - han)


def split_text(text: str, shortest: float = 1.0, longest: float = 15.0, sentences: bool = False) -> list[str]:
    """The pieces of a text, each about `shortest` to `longest` seconds long when spoken.

    They end at any punctuation, or with `sentences` at that which ends a sentence, unless they would be too long.

    None is longer; one is shorter only where it could be joined to neither neighbour. No piece is without anything to
    speak, unless the whole text is. Raises ValueError for lengths that make no sense.

    >>> split_text("He paid $3.50, then left. He asked Dr. Li: 'Why?' Nothing.", shortest=0.3)
    ['He paid $3.50, ', 'then left. ', "He asked Dr. Li: 'Why?' ", 'Nothing.']
    """
    if not 0 <= shortest <= longest or longest < HAN_SECONDS:
        raise ValueError(f"pieces of {shortest} to {longest} s: the shortest is at most the longest, which is >= 0.25")
    pieces = _cut_at(_SENTENCE if sentences else _CLAUSE, text)
    finer = (
        partial(_cut_at, _CLAUSE),
        partial(_cut_at, _QUOTED),
        lambda piece: _cut(piece, [match.end() for match in re.finditer(r"\s+", piece)]),
        partial(_cut_anywhere, longest=longest),
    )
    for cut in finer:
        pieces = [part for piece in pieces for part in _shorten(piece, cut, longest)]
    return _join_short(pieces, shortest, longest)


def _breaks(text: str) -> Iterator[tuple[int, int]]:
    """Where the text may be cut, ascending, and what ends there."""
    closing, straight, place = [], False, 0
    while place < len(text):
        character = text[place]
        if character in _OPEN_QUOTES:
            closing.append(_OPEN_QUOTES[character])
        elif closing and character == closing[-1]:
            closing.pop()
        elif character == '"':
            straight = not straight
        place += 1
        if character == "\n" or _stops(text, place - 1):
            # A quote that closes right behind the punctuation belongs to the piece.
            ends = text[place - 1] in _SENTENCE_ENDS
            while place < len(text) and (text[place] in _CLOSING or text[place] in _CHINESE_STOPS + _ENGLISH_STOPS):
                if text[place] == '"' and not straight:
                    break
                if closing and text[place] == closing[-1]:
                    closing.pop()
                straight ^= text[place] == '"'
                ends |= text[place] in _SENTENCE_ENDS
                place += 1
            while place < len(text) and text[place].isspace():
                place += 1
            yield place, _QUOTED if closing or straight else _SENTENCE if ends else _CLAUSE


def _stops(text: str, place: int) -> bool:
    """Whether the character at `place` ends something that is read in one go."""
    character = text[place]
    if character in _CHINESE_STOPS:
        return True
    if character not in _ENGLISH_STOPS:
        return False
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    if character in ".," and before.isdigit() and after.isdigit():
        return False
    # `Dr.`, and `example.com`
    return character != "." or not (_is_abbreviation(text, place) or _LETTER.match(after))


def _is_abbreviation(text: str, place: int) -> bool:
    """Whether the full stop at `place` ends an abbreviation or an initial, and not the text."""
    match = re.search(r"[A-Za-z]+(?:\.[A-Za-z]+)*$", text[max(0, place - 24) : place])
    following = _FOLLOWING.match(text, place + 1)
    if not match or not following:
        return False
    word = match.group()
    if word.lower() == "no":  # ends a sentence more often than not, unless a number follows
        return following.group(1).isdigit()
    return word.lower() in _ABBREVIATIONS or (len(word) == 1 and word.isupper() and word != "I")


def _cut_at(least: int, text: str) -> list[str]:
    return _cut(text, [place for place, ended in _breaks(text) if ended >= least])


def _cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place for place in places if 0 < place < len(text)} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)] if text else []


def _cut_anywhere(text: str, longest: float) -> list[str]:
    places, seconds = [], 0.0
    for place, character in enumerate(text):
        seconds += spoken_seconds(character)
        if seconds > longest:
            places.append(place)
            seconds = spoken_seconds(character)
    return _cut(text, places)


def _shorten(piece: str, cut, longest: float) -> list[str]:
    """The piece cut by `cut` when it is too long, its parts joined again as far as they may."""
    if spoken_seconds(piece) <= longest:
        return [piece]
    joined: list[str] = []
    for part in cut(piece):
        if joined and spoken_seconds(joined[-1] + part) <= longest:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _join_short(pieces: list[str], shortest: float, longest: float) -> list[str]:
    """Pieces shorter than `shortest` joined to the next one, or to the one before when the next has no room."""
    for side in (0, -1):
        joined: list[str] = []
        for piece in pieces:
            if joined and _may_join((joined[-1], piece), side, shortest, longest):
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def _may_join(pair: tuple[str, str], side: int, shortest: float, longest: float) -> bool:
    """Whether two neighbours become one: for the sake of the first (`side` 0) or the second one (-1)."""
    seconds = [spoken_seconds(piece) for piece in pair]
    if not all(seconds):  # nothing to speak in one of them
        return True
    return seconds[side] < shortest and spoken_seconds("".join(pair)) <= longest
