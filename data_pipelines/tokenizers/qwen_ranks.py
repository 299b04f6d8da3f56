"""The released text tokenizer from a file of byte-pair ranks (`qwen.tiktoken`: base64 token and rank on each line).

Ranks say which pair of pieces joins first; `tokenizers` wants the pairs themselves. Each token's pair is what is left
of it when all joins of lower rank are made.
"""

import base64
import binascii
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models

from baichuan_omni_jax.errors import ConfigError
from data_pipelines.tokenizers.special_tokens import SPECIAL_TOKENS
from data_pipelines.tokenizers.tokenizer import added_tokens, byte_level


def tokenizer_from_ranks(path: str | Path, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Byte-level BPE with the ranks as ids; the special tokens follow them. Raises ConfigError naming the file."""
    ranks = read_ranks(path)
    written = {token: _write_bytes(token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            pair = _split(token, rank, ranks)
            if len(pair) != 2:
                raise ConfigError(f"{path}: token {token!r} of rank {rank} is no join of two tokens of lower rank")
            merges.append((written[pair[0]], written[pair[1]]))
    vocabulary = {written[token]: rank for token, rank in ranks.items()}
    tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens(added_tokens(special_tokens))
    return tokenizer


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks. Raises ConfigError unless they are 0, 1, 2, ... without a gap."""
    try:
        lines = Path(path).read_bytes().splitlines()
        pairs = [line.split() for line in lines if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError, binascii.Error) as error:
        raise ConfigError(f"{path} is no file of byte-pair ranks: {error}") from error
    ordered = sorted(ranks.items(), key=lambda pair: pair[1])
    if [rank for _, rank in ordered] != list(range(len(ordered))):
        raise ConfigError(f"{path}: the ranks are not 0 to {len(ordered) - 1}, each once")
    return dict(ordered)


def _split(token: bytes, below: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Pieces of `token` after all joins of rank less than `below`, lowest rank first."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        joined = [ranks.get(a + b, below) for a, b in pairwise(pieces)]
        best = min(joined)
        if best >= below:
            break
        i = joined.index(best)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself, or the next free one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, free = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return characters


_CHARACTERS = _byte_characters()


def _write_bytes(token: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in token)
