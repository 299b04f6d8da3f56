"""Where a text that is spoken in pieces is cut: one rule, for training documents and for answers as they are made.

A piece ends behind one of `, ! ? . ， 。 ！ ？` and whatever marks, quotes and brackets close there; white space goes
with the next word, as tokenizers have it. A piece does not end

    inside numbers (`3.14`, `1,000`, `1，000`) and names (`example.com`): a full stop needs white space behind it;
    behind abbreviations and initials (`Dr. Li`, `U.S. law`, `J. K. Lo`, `No. 5`, but `No. Not that.`);
    inside quotes that close on the same line (a straight one right behind a digit opens none: `6" tall`);
    before the piece takes a least time to speak.

The rule reads characters from left to right and never looks further than the next one, so that it can be asked of a
text that is still being written. `cut_places` asks it of a text; `piece_table` writes it down as arrays over a
tokenizer's tokens, by which a device follows it from token to token (`generation/slots.py`).

    text      We paid 1,000. Dr. Li left, and I stayed.
    cut                      |             |
    pieces    "We paid 1,000."  " Dr. Li left,"  " and I stayed."

Imports neither jax nor data_pipelines.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
HAN_UNITS, OTHER_UNITS = 25, 7
"""Hundredths of a second that a Chinese character, and any other letter or digit, take when they are spoken."""

Marks = Literal["clauses", "sentences", "all"]
"""What ends a piece: any of the marks; those that end a sentence, and line ends; every mark, line ends too."""

# What a character is to the rule.
OTHER, LETTER, DIGIT, SPACE, BLANK, LINE, MARK, COMMA, STOP, JOINS, OPENS, CLOSES, QUOTE, LINE_END, NOTHING = range(
    KINDS := 15
)
# What came last: nothing of note, a digit, a mark, a comma behind a digit, a full stop, that of `No.`, white space
# behind that.
PLAIN, NUMBER, AT_MARK, AT_NUMBER, AT_STOP, AT_NO, SPACED_NO = range(_STATES := 7)
# What the word before a full stop is.
ENDS, SHORT, NO = range(3)

_DEEPEST = 3  # quotes within quotes that are counted
QUOTE_STATES = 2 * (_DEEPEST + 1)  # states of quotes: straight ones open or not, and how deep the others are
# What `_grow` makes of a text, and texts that only go on with a word.
_LAST_WORD = re.compile(r"[A-Za-z]+(?:\.[A-Za-z]+)*\.?\Z")
_PART_OF_WORD = re.compile(r"\.?[A-Za-z]+(?:\.[A-Za-z]+)*\.?|\.")
_SPOKEN = re.compile(r"[^\W_]")
_KINDS = {
    "clauses": {MARK: "。！？!?", COMMA: ",，", STOP: ".", JOINS: "；;…"},
    "sentences": {MARK: "。！？…!?", STOP: ".", JOINS: "，；;,", LINE_END: "\n\r"},
    "all": {MARK: "。！？；…!?;", COMMA: ",，", STOP: ".", LINE_END: "\n\r"},
}
_ALWAYS = {
    LINE: "\n\r\v\f\x85\u2028\u2029",
    SPACE: " ",
    JOINS: "'’)）】]",
    OPENS: "“「『《",
    CLOSES: "”」』》",
    QUOTE: '"',
}
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon st jr sr gen col capt lt sgt maj gov sen messrs esq vs etc approx dept univ est "
    "fig vol vols p pp ed eds al ca viz nos inc ltd co corp bros cf ph.d ave blvd rd mt "
    "jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues thu thur thurs fri".split()
)
# Words as numbers: their last six characters in base 28, `a` 1 to `z` 26 and the full stop 27.
WORD_BASE, WORD_DOT, WORD_LENGTH = 28, 27, 6
# What stands for a character of which a token has the first bytes alone, by the first one, or has the last ones alone.
_PARTS = {"sign": "\ue000", "letter": "\ue001", "han": "\ue002", "end": "\ue003"}
_LIKE = (("sign", 0xEA), ("han", 0xE4), ("letter", 0xE3), ("sign", 0xE2), ("letter", 0xC3))


def spoken_units(text: str) -> int:
    """Estimates how long the text is when spoken, in hundredths of a second; punctuation and white space take
    no time.
    """
    han = len(HAN.findall(text))
    return HAN_UNITS * han + OTHER_UNITS * (len(_SPOKEN.findall(text)) - han)


def cut_places(text: str, least: float = 0.0, marks: Marks = "clauses", quotes: bool = True) -> list[int]:
    """Finds where the rule cuts a text, ascending. Each piece but the last has something to speak.

    Args:
        text: what is spoken.
        least: seconds that a piece takes at least.
        marks: what ends a piece.
        quotes: whether quotes are kept whole; if not, it cuts inside them too.

    Returns:
        Places in the text.

    >>> cut_places("It is 3.14, not 3. Dr. Li knows.")
    [11, 18]
    """
    after, cuts = _transitions(quotes)
    places: list[int] = []
    # One pass, one character of state: the same tables that the device follows token by token.
    state, word, units, before, fewest = 0, "", 0, OTHER, round(100 * least)
    for place, (character, kind) in enumerate(zip(text, map(ord, text.translate(_kinds(marks))), strict=True)):
        column = state * 3 + (_word_before_stop(word) if kind == STOP else ENDS)
        if cuts[kind][column] and units and units >= fewest:
            places.append(place - _goes_along(before, kind))
            units = 0
        state, before = int(after[kind][column]) // 3, kind
        word = _grow(word, character)
        units += spoken_units(character)
    return places


class PieceTable(NamedTuple):
    """The rule over the v tokens of a tokenizer, as arrays; what a token means to the rule is one of k rows.

    A line of `words` tells of the word a token ends in: whether the token is part of one word, that part as a number,
    its length, whether it begins with a full stop, the word it ends in, its length, whether that is one capital letter.
    """

    row: Int32[np.ndarray, " v"]  # of each token
    after: Int32[np.ndarray, "k s"]  # [row, 3 * state + word] is the state behind such a token
    cuts: Int32[np.ndarray, "k s"]  # how many of its characters stand before a cut; -1: no cut
    prefix: Int32[np.ndarray, "v n"]  # what is kept of it where it is cut behind 1 to n characters (`_kept`)
    units: Int32[np.ndarray, " v"]  # hundredths of a second that it takes to speak
    words: Int32[np.ndarray, "v 7"]  # the word that it ends in
    abbreviations: Int32[np.ndarray, " a"]  # as numbers, ascending


def piece_table(tokenizer: Tokenizer | None, vocab: int) -> PieceTable:
    """Writes down the rule for a tokenizer's tokens. Without a tokenizer all are alike: there is no mark among them."""
    if tokenizer is None:
        return table_of_texts(["-"] * vocab)._replace(units=np.full(vocab, OTHER_UNITS, np.int32))
    texts, ids = [""] * vocab, [i for i in range(vocab) if tokenizer.id_to_token(i) is not None]
    for i, text in zip(ids, tokenizer.decode_batch([[i] for i in ids]), strict=True):
        texts[i] = text if "\ufffd" not in text else _whole_characters(tokenizer.id_to_token(i) or "") or text
    return table_of_texts(texts)


def table_of_texts(texts: Sequence[str]) -> PieceTable:
    """Writes down the rule for tokens that are these texts ("" for one that is no text).

    Exact where texts are split as Qwen does: a mark begins a token or stands among signs alone. A mark that is itself
    spelled by several tokens, byte by byte, is not seen.
    """
    # Tokens whose characters are of the same kinds share a row.
    parts = set(_PARTS.values())
    by_text = {text: i for i, text in reversed(list(enumerate(texts))) if text and not {text[0], text[-1]} & parts}
    kinds = [text.translate(_kinds("clauses")) for text in texts]
    numbers: dict[str, int] = {}
    row = np.array([numbers.setdefault(each, len(numbers)) for each in kinds], np.int32)
    after, cuts = zip(*map(_follow, numbers), strict=True)
    # A cut within a token keeps its beginning, if that is a token too; few tokens can be cut at all.
    inner = [sorted(set(places[places > 0].tolist())) for places in cuts]
    prefix = np.full((len(texts), max([1, *(n for places in inner for n in places)])), -1, np.int32)
    for i, text in enumerate(texts):
        for n in inner[row[i]]:
            prefix[i, n - 1] = _kept(text, n, by_text)
    # A character whose first bytes alone are here is spoken with this token, not with the one that ends it.
    part = {_PARTS["letter"]: OTHER_UNITS, _PARTS["han"]: HAN_UNITS}
    units = [spoken_units(text) + part.get(text[-1:], 0) for text in texts]
    return PieceTable(
        row,
        np.stack(after),
        np.stack(cuts),
        prefix,
        np.array(units, np.int32),
        np.array([_word_of_token(text) for text in texts], np.int32),
        np.array(sorted(map(_word_number, _ABBREVIATIONS)), np.int32),
    )


class _Kinds(dict):
    """The kind of each character, by its code point, as a character: what `str.translate` takes."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        # Letters first: Chinese numerals are both.
        found = LETTER if character.isalpha() else DIGIT if character.isnumeric() else OTHER
        self[code] = chr(BLANK if found == OTHER and character.isspace() else found)
        return self[code]


@cache
def _kinds(marks: Marks) -> _Kinds:
    tables = (_ALWAYS, _KINDS[marks], {LETTER: _PARTS["letter"] + _PARTS["han"], NOTHING: _PARTS["end"]})
    return _Kinds(
        {ord(character): chr(kind) for table in tables for kind, those in table.items() for character in those}
    )


def _advance(waiting: int, inside: int, word: int, kind: int) -> tuple[bool, int]:
    """Tells whether the rule cuts before a character of this kind, quotes aside; and what came last, behind it."""
    blank, mark = kind in (SPACE, BLANK, LINE), kind in (MARK, COMMA)
    joins = mark or kind in (STOP, JOINS, CLOSES) or (kind == QUOTE and inside >= _DEEPEST + 1)
    if kind == LINE_END:
        return True, PLAIN
    if kind == NOTHING:
        return False, waiting
    if blank and waiting in (AT_NO, SPACED_NO):  # what follows decides
        return False, SPACED_NO
    if joins and waiting in (AT_MARK, AT_NUMBER, AT_STOP, AT_NO):
        return False, AT_MARK if mark else AT_STOP if waiting == AT_NO else waiting
    cut = waiting == AT_MARK or (waiting == AT_STOP and blank)
    cut = cut or (waiting in (AT_NUMBER, SPACED_NO) and kind != DIGIT)
    if kind == STOP:
        return cut, (AT_STOP, PLAIN, AT_NO)[word]
    if kind == COMMA and waiting == NUMBER:
        return cut, AT_NUMBER
    return cut, AT_MARK if mark else NUMBER if kind == DIGIT else PLAIN


def _quoted(waiting: int, inside: int, kind: int) -> int:
    """Returns the state of quotes behind a character of this kind; a line end closes them all."""
    straight, depth = divmod(inside, _DEEPEST + 1)
    if kind in (LINE, LINE_END):
        return 0
    # Behind a digit it may close quotes, but opens none: inches, seconds.
    straight ^= kind == QUOTE and (straight or waiting != NUMBER)
    depth = min(_DEEPEST, max(0, depth + (kind == OPENS) - (kind == CLOSES)))
    return straight * (_DEEPEST + 1) + depth


@cache
def _transitions(quotes: bool = True) -> tuple[Int32[np.ndarray, "k s"], np.ndarray]:
    """Tabulates by kind and by 3 * state + word: 3 * the next state, and whether the rule cuts before the character."""
    columns = _STATES * QUOTE_STATES * 3
    after, cuts = np.zeros((KINDS, columns), np.int32), np.zeros((KINDS, columns), bool)
    for kind in range(KINDS):
        for column in range(columns):
            (waiting, inside), word = divmod(column // 3, QUOTE_STATES), column % 3
            cut, now = _advance(waiting, inside, word, kind)
            after[kind, column] = 3 * (now * QUOTE_STATES + _quoted(waiting, inside, kind))
            cuts[kind, column] = cut and not (quotes and inside)
    return after, cuts


def _goes_along(before: int, kind: int) -> bool:
    """Tells whether a cut behind white space is one before it: the two stand in one token, as texts are split."""
    return (before == SPACE and kind != DIGIT) or (before == BLANK and kind == LETTER)


def _follow(kinds: str) -> tuple[Int32[np.ndarray, " s"], Int32[np.ndarray, " s"]]:
    """Follows a token whose characters are of these kinds: the state behind it, and where it is cut, from each
    column.
    """
    after, cuts = _transitions()
    columns = np.arange(_STATES * QUOTE_STATES * 3)
    place, before = np.full(len(columns), -1, np.int32), OTHER
    for number, kind in enumerate(map(ord, kinds)):
        here = cuts[kind][columns] & (place < 0)
        place[here] = number - (number > 0 and _goes_along(before, kind))
        columns, before = after[kind][columns], kind
    return (columns // 3).astype(np.int32), place


def _kept(text: str, place: int, by_text: Mapping[str, int]) -> int:
    """Returns what is kept of a token that is cut at `place`: the token of what stands before, -1 where there is none.

    -2 - i is the token i of fewer characters: it is written, and the piece goes on with what the model says then. So
    ` —.` of ` —.\\n`, which is no token, is written as ` —`, and its full stop comes next.
    """
    longest = next((n for n in range(place, 0, -1) if text[:n] in by_text), 0)
    found = by_text.get(text[:longest], -1)
    return found if longest == place else -2 - found if longest else -1


def _whole_characters(token: str) -> str:
    """Returns the text of a token that begins or ends within a character (`token` writes bytes as byte-level tokenizers
    do).

    A character counts where it begins: one of `_PARTS` stands for what is there of it.
    """
    alphabet = _byte_alphabet()
    found = bytes(alphabet[sign] for sign in token if sign in alphabet)
    start = next((place for place, byte in enumerate(found) if byte & 0xC0 != 0x80), len(found))
    text = found[start:].decode("utf-8", "replace").rstrip("\ufffd")
    rest = found[start + len(text.encode()) :]
    last = _PARTS[next((part for part, first in _LIKE if first <= rest[0]), "sign")] if rest else ""
    return (_PARTS["end"] if start else "") + text + last


@cache
def _byte_alphabet() -> dict[str, int]:
    """Maps bytes to characters: byte-level tokenizers write printable bytes as they are, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _grow(word: str, character: str) -> str:
    """Returns the word that a text ends in, one character later: letters, and full stops between them."""
    if character == ".":
        return word + "." if word and word[-1] != "." else ""
    return word + character if character.isascii() and character.isalpha() else ""


def _word_before_stop(word: str) -> int:
    """Returns what a full stop behind this word is: the end of a sentence, of an abbreviation or initial, or that of
    `No.`
    """
    small = word.lower()
    if not word or word[-1] == ".":
        return ENDS
    if small == "no":
        return NO
    initial = len(word) == 1 and word.isupper() and word != "I"
    return SHORT if small in _ABBREVIATIONS or initial or (len(word) > 2 and word[-2] == ".") else ENDS


def _word_number(word: str) -> int:
    number = 0
    for character in word.lower()[-WORD_LENGTH:]:
        number = number * WORD_BASE + (WORD_DOT if character == "." else ord(character) - 96)
    return number


def _word_of_token(text: str) -> tuple[int, ...]:
    """Returns a line of `PieceTable.words`."""
    found = _LAST_WORD.search(text)
    tail, part = found[0] if found else "", bool(_PART_OF_WORD.fullmatch(text))
    single = len(tail) == 1 and tail.isupper() and tail != "I"
    lengths = min(len(text), WORD_LENGTH + 1), min(len(tail), WORD_LENGTH + 1)
    number = _word_number(text) if part else 0
    return (part, number, lengths[0], text[:1] == ".", _word_number(tail), lengths[1], single)
