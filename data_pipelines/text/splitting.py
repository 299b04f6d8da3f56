"""Texts cut into pieces to be spoken or written, by the rule of `speech_segments`, and kept in length.

The pieces joined are the text, white space included: what stands before a word goes with the word. What the rule leaves
too long is cut at other marks, inside quotes, at white space, at last anywhere.
"""

import re
from functools import partial

from baichuan_omni_jax.config import READ_AT_LEAST
from data_pipelines.text.speech_segments import HAN_UNITS, cut_places, spoken_units

HAN_SECONDS = HAN_UNITS / 100
"""What a Chinese character takes when it is spoken."""
LONGEST = 15.0
"""Seconds that a piece takes to speak at most: the speech of an answer is not much longer than clips one trains on."""


def spoken_seconds(text: str) -> float:
    """Estimates how long the text is when spoken; punctuation and white space take no time.

    >>> spoken_seconds("湖水很平静。"), spoken_seconds("!?")
    (1.25, 0.0)
    """
    return spoken_units(text) / 100


def split_text(
    text: str, shortest: float = READ_AT_LEAST, longest: float = LONGEST, sentences: bool = False
) -> list[str]:
    """Splits a text into pieces that joined are the text, each about `shortest` to `longest` seconds long when spoken.

    They end where the generating engine ends them, or with `sentences` where sentences and lines end, unless they
    would be too long. None is longer. The last one may be shorter than `shortest`, as the last of an answer is (with
    `sentences` it is joined to the one before); another one is only where it has no room beside its neighbors. No
    piece is without anything to speak, unless the whole text is.

    Args:
        text: what is spoken.
        shortest: seconds that a piece takes at least.
        longest: seconds that it takes at most.
        sentences: whether pieces are sentences, rather than clauses.

    Returns:
        The pieces.

    Raises:
        ValueError: lengths that make no sense.

    >>> split_text("He paid $3.50, then left. He asked Dr. Li: 'Why?' Nothing.", shortest=0.3)
    ['He paid $3.50,', ' then left.', " He asked Dr. Li: 'Why?'", ' Nothing.']
    """
    if not 0 <= shortest <= longest or longest < HAN_SECONDS:
        raise ValueError(f"pieces of {shortest} to {longest} s: the shortest is at most the longest, which is >= 0.25")
    pieces = _cut(text, cut_places(text, shortest, "sentences" if sentences else "clauses"))
    # Finer and finer cuts, each for what the one before left too long: quotes, other marks, white space, anywhere.
    finer = (
        lambda piece: _cut(piece, cut_places(piece)),
        lambda piece: _cut(piece, cut_places(piece, marks="all", quotes=False)),
        lambda piece: _cut(piece, [match.start() for match in re.finditer(r"\s+", piece)]),
        partial(_cut_anywhere, longest=longest),
    )
    for cut in finer:
        pieces = [part for piece in pieces for part in _shorten(piece, cut, longest)]
    return _join_short(pieces, shortest, longest, last=sentences)


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
    """Cuts the piece by `cut` when it is too long, its parts joined again as far as they may."""
    if spoken_seconds(piece) <= longest:
        return [piece]
    joined: list[str] = []
    for part in cut(piece):
        if joined and spoken_seconds(joined[-1] + part) <= longest:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _join_short(pieces: list[str], shortest: float, longest: float, last: bool) -> list[str]:
    """Joins pieces shorter than `shortest` to the next one, or to the one before when the next has no room.

    The last one stays as it is unless it is to be joined, too (`last`), or has nothing to speak.
    """
    for side in (0, -1):
        joined: list[str] = []
        for number, piece in enumerate(pieces, start=1):
            least = 0.0 if side and number == len(pieces) and not last else shortest
            if joined and _may_join((joined[-1], piece), side, least, longest):
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


def _may_join(pair: tuple[str, str], side: int, shortest: float, longest: float) -> bool:
    """Tells whether two neighbors become one: for the sake of the first (`side` 0) or the second one (-1)."""
    seconds = [spoken_seconds(piece) for piece in pair]
    if not all(seconds):  # nothing to speak in one of them
        return True
    return seconds[side] < shortest and spoken_seconds("".join(pair)) <= longest
