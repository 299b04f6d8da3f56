"""Where a segment of text that is spoken ends, from token to token.

The rule is that of `data_pipelines.text.speech_segments`, which cuts whole texts. It is followed here by arithmetic and
look-ups in small arrays, so that it runs inside the program that samples.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from data_pipelines.text.speech_segments import (
    ENDS,
    NO,
    QUOTE_STATES,
    SHORT,
    WORD_BASE,
    WORD_DOT,
    WORD_LENGTH,
    PieceTable,
)

_NO = (ord("n") - 96) * WORD_BASE + (ord("o") - 96)  # the word `no`
_POWERS = np.array([WORD_BASE**n for n in range(WORD_LENGTH + 1)], np.int32)


class SegmentProgress(NamedTuple):
    """Where the text of b rows stands: units spoken since the last segment, the rule's state, and the word it ends in.

    The word is its last characters as a number, its length up to `WORD_LENGTH` + 1, and whether it is one capital
    letter.
    """

    units: Int32[Array, " b"]
    state: Int32[Array, " b"]
    word: Int32[Array, " b"]
    length: Int32[Array, " b"]
    single: Int32[Array, " b"]


class SegmentStep(NamedTuple):
    """What a written token comes to: `before`: a segment ends before it, so that it is not written; `within`: it ends
    inside it. `token` is what is written: of a token that is cut what stands before, or a part of that where it is no
    token by itself; the segment then goes on. `progress` is behind `token` where it is written."""

    before: Bool[Array, " b"]
    within: Bool[Array, " b"]
    token: Int32[Array, " b"]
    progress: SegmentProgress


def init_progress(count: int) -> SegmentProgress:
    """Of `count` rows without text, on the host."""
    zeros: Any = np.zeros(count, np.int32)  # numpy's where JAX's is declared: a jitted function takes either
    return SegmentProgress(zeros, zeros, zeros, zeros, zeros)


def next_segment(progress: SegmentProgress) -> SegmentProgress:
    """The same, when the segment that was being written is over."""
    return progress._replace(units=jnp.zeros_like(progress.units), state=progress.state % QUOTE_STATES)


def advance_segment(
    table: PieceTable, progress: SegmentProgress, token: Int32[Array, " b"], may_end: Bool[Array, " b"]
) -> SegmentStep:
    """What `token`, written next, comes to; a segment may end only where `may_end`."""
    # The rule as look-ups: its state and the word before say where in the token a segment would end.
    column = progress.state * 3 + _word_before_stop(table, progress)
    place = table.cuts[table.row[token], column]
    kept = table.prefix[token, jnp.clip(place - 1, 0, table.prefix.shape[1] - 1)]
    before = may_end & (place == 0)
    within = may_end & (place > 0) & (kept >= 0)
    # Fewer characters than stand before the cut: what the model says next meets the rule at the same place.
    shortened = may_end & (place > 0) & (kept < -1)
    token = jnp.where(within, kept, jnp.where(shortened, -2 - kept, token))

    # Progress behind what is really written: a token that is cut counts with its beginning.
    word, length, single = _next_word(table, progress, token)
    after = SegmentProgress(
        progress.units + table.units[token], table.after[table.row[token], column], word, length, single
    )
    return SegmentStep(before, within, token, after)


def _word_before_stop(table: PieceTable, at: SegmentProgress) -> Array:
    """`speech_segments.ENDS`, `SHORT` or `NO`, if a full stop came next."""
    last, second = at.word % WORD_BASE, at.word // WORD_BASE % WORD_BASE
    known = (at.word[:, None] == table.abbreviations).any(-1) & (at.length <= WORD_LENGTH)
    dotted = (at.length > 2) & (second == WORD_DOT)
    word = jnp.where(known | dotted | (at.single > 0), SHORT, ENDS)
    word = jnp.where((at.word == _NO) & (at.length == 2), NO, word)
    return jnp.where((at.length == 0) | (last == WORD_DOT), ENDS, word)


def _next_word(table: PieceTable, at: SegmentProgress, token: Array) -> tuple[Array, Array, Array]:
    """The word that the text ends in behind `token`, as in `SegmentProgress`."""
    part, number, size, dot_first, tail, tail_size, single = jnp.moveaxis(table.words[token], -1, 0)
    # Part of a word goes on with the word before it, unless two full stops meet.
    goes_on = (part > 0) & (at.length > 0) & ~((dot_first > 0) & (at.word % WORD_BASE == WORD_DOT))
    # Characters are digits: what is added shifts the others, and those beyond WORD_LENGTH fall off.
    kept = jnp.clip(size, 0, WORD_LENGTH)
    powers = jnp.asarray(_POWERS)
    joined = at.word % powers[WORD_LENGTH - kept] * powers[kept] + number
    return (
        jnp.where(goes_on, joined, tail),
        jnp.where(goes_on, jnp.minimum(at.length + size, WORD_LENGTH + 1), tail_size),
        jnp.where(goes_on, 0, single),
    )
