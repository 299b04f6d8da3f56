"""Texts to be spoken: cut into pieces and kept in length, by the rule of `speech_segments`; which language they are in.

The pieces joined are the text, white space included: what stands before a word goes with the word. What the rule leaves
too long is cut at other marks, inside quotes, at white space, at last anywhere.

Languages are told by scripts and the commonest words. Chinese and English share no letters, so that counting scripts
tells them apart; a model of a hundred languages would add megabytes, and mistakes on short texts. Others with the same
letters are known by what these two never have (kana, in Japanese) or never lack (the common words of English).
"""

import re
from functools import partial

from baichuan_omni_jax.config import READ_AT_LEAST
from data_pipelines.text.speech_segments import HAN, HAN_UNITS, cut_places, spoken_units

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
    # Only what is too long is touched: cuts of the common rule stay where they are.
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
    # First each short piece looks ahead, then what is still short looks back.
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


_LETTER = re.compile(r"[^\W\d_]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)?")
_COMMON = frozenset(
    "the of and to in a is that it for was on are as with his they at be this have from or had by not but what all "
    "were we when your can said there an each which she do how their if will up other about out many then them these "
    "so some her would him into has more two he i you my me its our no yes who where why".split()
)

WORDS = 20  # Latin words from which the common ones count
COMMON_SHARE = 0.1  # of the words: English prose has 0.3 to 0.5
KANA_SHARE = 0.1  # of the letters, from which a text is Japanese
MINOR_SHARE = 0.2  # of the text, from which a second language counts


def detect_language(text: str) -> str:
    """Detects the text's language: "en", "zh", "mixed" for both, "other", or "none" without letters.

    A Chinese character counts as one, an English word as one.

    >>> detect_language("Good morning."), detect_language("早上好。"), detect_language("42!")
    ('en', 'zh', 'none')
    """
    letters, han, kana = (len(pattern.findall(text)) for pattern in (_LETTER, HAN, _KANA))
    words = _LATIN_WORD.findall(text)
    latin = sum(len(_LETTER.findall(word)) for word in words)
    # Numbers and signs alone: any voice will do.
    if not letters:
        return "none"
    if kana > KANA_SHARE * letters or han + latin < 0.5 * letters:
        return "other"
    english = len(words) / (len(words) + han)
    # Latin letters are not English yet: prose in it never lacks the common words.
    if len(words) >= WORDS and english >= MINOR_SHARE:
        common = sum(word.lower() in _COMMON for word in words)
        if common < COMMON_SHARE * len(words):
            return "other"
    return "en" if english > 1 - MINOR_SHARE else "zh" if english < MINOR_SHARE else "mixed"


def language_of(text: str) -> str:
    """Returns the language of the two to speak a text in, "en" or "zh"; "" for a text in another one.

    Chinese voices speak English words, while English ones spell Chinese characters, so a mixed text is "zh".
    """
    return {"mixed": "zh", "none": "en", "other": ""}.get(found := detect_language(text), found)
