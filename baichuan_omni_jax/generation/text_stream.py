"""Tokens to text as they come: whole characters only, and nothing that may still become a stop string."""

from collections.abc import Iterable

from tokenizers import Tokenizer

from baichuan_omni_jax.generation.events import TextDelta

_UNFINISHED = "\ufffd"
# A character is at most four bytes, so at most three tokens wait for its last one.
_LONGEST = 4


class TextStream:
    """The text of one answer. Without a tokenizer tokens pass at once, and their text is empty.

    `stopped` once one of the strings `stop` was written; the text ends before it. Special tokens have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...]):
        self._tokenizer, self._stop = tokenizer, stop
        self._waiting: list[int] = []
        self._text = ""
        # Tokens whose text is not out yet: token, log-probability, and where it ends in `_text` (-1: not known yet).
        self._tokens: list[tuple[int, float, int]] = []
        self.stopped = False

    def push(self, token: int, logprob: float) -> TextDelta | None:
        """The next token; returns what may be shown now, if anything."""
        self._waiting.append(token)
        self._tokens.append((token, logprob, -1))
        self._read(last=False)
        return self._cut() or self._release(len(self._text) - self._held())

    def flush(self) -> TextDelta | None:
        """The rest: nothing more comes, or speech comes in between."""
        self._read(last=True)
        return self._cut() or self._release(len(self._text))

    def _read(self, last: bool) -> None:
        """Appends the text of waiting tokens, if they are whole characters."""
        text = self._tokenizer.decode(self._waiting) if self._tokenizer and self._waiting else ""
        if text.endswith(_UNFINISHED) and len(self._waiting) < _LONGEST and not last:
            return
        self._waiting, self._text = [], self._text + text
        self._tokens = [(token, p, len(self._text) if end < 0 else end) for token, p, end in self._tokens]

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        sizes = (size for stop in self._stop for size in range(1, len(stop)) if self._text.endswith(stop[:size]))
        return max(sizes, default=0)

    def _cut(self) -> TextDelta | None:
        found = [at for at in (self._text.find(stop) for stop in self._stop) if at >= 0]
        if not found:
            return None
        self.stopped, self._text = True, self._text[: min(found)]
        # The token in which the stop string begins counts as text where some of it is text.
        starts = [0, *(end for _, _, end in self._tokens[:-1])]
        kept = [token for token, start in zip(self._tokens, starts, strict=True) if start < len(self._text)]
        self._tokens = [(token, p, min(end, len(self._text))) for token, p, end in kept]
        return self._release(len(self._text))

    def _release(self, count: int) -> TextDelta | None:
        out = [token for token in self._tokens if 0 <= token[2] <= count]
        if not out:
            return None
        size = out[-1][2]
        text, self._text = self._text[:size], self._text[size:]
        self._tokens = [(token, p, end - size if end >= 0 else end) for token, p, end in self._tokens[len(out) :]]
        return _piece(text, out)


def _piece(text: str, tokens: Iterable[tuple[int, float, int]]) -> TextDelta:
    return TextDelta(text, tuple(token for token, _, _ in tokens), tuple(p for _, p, _ in tokens))
