"""Text tokenizers: the names of special tokens; reading, training, checking one; the released one.

`SPECIAL_TOKENS` lists the released added tokens in the order of their ids; a tokenizer trained here gives them the ids
0..58 (`baichuan_omni_jax.config.model.TRAINED_TOKENS`), the released one 151643..151701.

All tokenizers are byte-level BPE with the Qwen split rule and NFC. Released special tokens map to one id each wherever
their names stand in the text.

The released tokenizer comes as a file of byte-pair ranks (`qwen.tiktoken`: base64 token and rank on each line). Ranks
say which pair of pieces joins first; `tokenizers` wants the pairs themselves. Each token's pair is what is left of it
when all joins of lower rank are made.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from baichuan_omni_jax.config import OmniConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import describe_stand_in, parse_path, with_retries

SPECIAL_TOKENS: tuple[str, ...] = tuple(
    json.loads(Path(__file__).with_name("special_tokens.json").read_text(encoding="utf-8")),
)

END_OF_TEXT = "<|endoftext|>"
SYSTEM, USER, ASSISTANT = "<B_SYS>", "<C_Q>", "<C_A>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<audio_start_baichuan>", "<audio_end_baichuan>", "<audio_pad_baichuan>"
AUDIOGEN_START, AUDIOGEN_END = "<audiogen_start_baichuan>", "<audiogen_end_baichuan>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img_start_baichuan>", "<img_end_baichuan>", "<img_pad_baichuan>"
AUDIOTEXT_START = "<audiotext_start_baichuan>"  # before the turn of an assistant that answers in speech
VIDEO_START, VIDEO_END = "<video_start_baichuan>", "<video_end_baichuan>"
VIDEO_PLACE = "<video_palce_baichuan>"  # the released spelling

# Marks of a source prompt; they are no tokens and never reach the tokenizer.
TRAINABLE_START, TRAINABLE_END = "<trainable_start>", "<trainable_end>"
FRAME_START, FRAME_END = "<videoframe_start_omni>", "<videoframe_end_omni>"
TOKENS_START, TOKENS_END = "<tokens_start_omni>", "<tokens_end_omni>"
LITERAL = "<literal_omni>"  # within a name: the name is text (`prompts.escape`)

# What a tokenizer must know as one token each, besides those of the model: the marks of a conversation.
CONVERSATION_TOKENS: tuple[str, ...] = (SYSTEM, USER, ASSISTANT, AUDIOTEXT_START)

# Field of `baichuan_omni_jax.config.SpecialTokens` -> name of the token.
MODEL_TOKENS: dict[str, str] = {
    "end_of_text": END_OF_TEXT,
    "audio_start": AUDIO_START,
    "audio_end": AUDIO_END,
    "audio_pad": AUDIO_PAD,
    "image_start": IMAGE_START,
    "image_end": IMAGE_END,
    "image_pad": IMAGE_PAD,
    "video_place": VIDEO_PLACE,
    "video_start": VIDEO_START,
    "video_end": VIDEO_END,
    "audiogen_start": AUDIOGEN_START,
    "audiogen_end": AUDIOGEN_END,
}


# Contractions, words with one leading sign, single digits, runs of signs, line breaks, other white space.
SPLIT_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = re.compile("|".join(re.escape(name) for name in SPECIAL_TOKENS))


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """Loads the tokenizer of a `tokenizer.json`, which may be a URL. Raises ConfigError naming the file."""
    file = parse_path(path)
    try:
        if found := describe_stand_in(file):
            raise ConfigError(f"it is {found}")
        return Tokenizer.from_str(with_retries(file.read_text, f"reading {file}"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"tokenizer {path} cannot be read: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer of at most `vocab_size` entries: special tokens (ids 0..58), the 256 bytes, then merges of
    `texts`.

    The same texts give the same tokenizer. Special-token names in the texts are left out of the training.
    Raises ConfigError when `vocab_size` has no room for special tokens and bytes.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ConfigError(f"a trained tokenizer has at least {least} entries, not {vocab_size}")
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=added_tokens(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # Names of special tokens are no text: merges across their letters would never be used.
    plain = (part for text in texts for part in _SPECIAL.split(text) if part)
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encodes `text`; names of special tokens in it become their ids, nothing is added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Copies a tokenizer, except that names of special tokens are text as any other: for text that strangers write."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    return plain


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Differs between tokenizers that differ in anything (32 hex digits)."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:32]


def check_tokenizer(tokenizer: Tokenizer, config: OmniConfig) -> None:
    """Raises ConfigError, naming the token, unless the tokenizer's ids are the model's and fit its vocabulary."""
    for field, name in MODEL_TOKENS.items():
        found, expected = tokenizer.token_to_id(name), getattr(config.tokens, field)
        if found != expected:
            has = "does not have it" if found is None else f"gives it id {found}"
            raise ConfigError(f"the model's tokens.{field} is {expected}, but the tokenizer {has} ({name})")
    for name in CONVERSATION_TOKENS:
        if tokenizer.token_to_id(name) is None:
            raise ConfigError(f"the tokenizer does not have {name}, a mark of conversations")
    # Every id must have a row in the embedding.
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.llm.vocab_size:
        name = tokenizer.id_to_token(largest)
        raise ConfigError(
            f"the tokenizer's token {name!r} has id {largest}, outside llm.vocab_size {config.llm.vocab_size}"
        )


def byte_level(model: models.Model) -> Tokenizer:
    """Makes a tokenizer around `model`: NFC, the Qwen split rule, bytes written as printable characters."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_RULE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def added_tokens(names: Iterable[str]) -> list[AddedToken]:
    """Makes special tokens that match their exact names only."""
    return [AddedToken(name, normalized=False, special=True) for name in names]


def tokenizer_from_ranks(path: str | Path, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Builds the byte-level BPE with the ranks as ids; the special tokens follow them. Raises ConfigError naming the
    file.
    """
    ranks = read_ranks(path)
    written = {token: "".join(_CHARACTERS[byte] for byte in token) for token in ranks}
    # Merges in the order of the ranks, as a trained BPE would have learned them.
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
    """Reads token -> rank, in the order of the ranks. Raises ConfigError unless they are 0, 1, 2, ... without a gap."""
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
    """Splits `token` into pieces after all joins of rank less than `below`, lowest rank first."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        # The lowest rank joins first, whatever its place.
        joined = [ranks.get(a + b, below) for a, b in pairwise(pieces)]
        best = min(joined)
        if best >= below:
            break
        i = joined.index(best)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _byte_characters() -> list[str]:
    """Returns the printable character that byte-level BPE writes for each byte: itself, or the next free one from 256
    on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    characters, free = [], 256
    for byte in range(256):
        characters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return characters


_CHARACTERS = _byte_characters()
