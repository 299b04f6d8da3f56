"""The text tokenizer of a public language model, and the same one with every special token of ours.

A Qwen2 or Qwen2.5 folder has `tokenizer.json`, or `vocab.json` and `merges.txt` with the special tokens in
`tokenizer_config.json`. Its embedding table has more rows than the tokenizer has tokens (151936 or 152064 against
151665), so tokens are added without changing a shape. On Qwen2.5 they get the ids that the released model has.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from baichuan_omni_jax.config.model import SpecialTokens
from baichuan_omni_jax.config.parts import TextVocabulary
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.storage import read_json_object, refuse_stand_in
from data_pipelines.tokenizers.tokenizer import MODEL_TOKENS, SPECIAL_TOKENS, added_tokens, byte_level, load_tokenizer

TOKENIZER, VOCABULARY, MERGES, CONFIG = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"

# Every ASCII and Latin-1 character, and some of three and four bytes.
_ANY_TEXT = "".join(map(chr, range(256))) + "模型 😀\n"


def read_vocabulary(folder: Path, rows: int) -> TextVocabulary:
    """Reads the tokenizer of a language model's folder and adds our special tokens on free rows.

    Args:
        folder: a Hugging Face folder.
        rows: of the model's embedding table.

    Raises:
        ConfigError: no tokenizer, one that cannot be read, is not byte-level or whose ids lie outside the table, or too
            few free rows.
    """
    tokenizer, source = _open(folder)
    if not _gives_back(tokenizer, _ANY_TEXT):
        raise ConfigError(f"{source}: text is not what comes back from its tokens: a Qwen2 has byte-level BPE")
    known = tokenizer.get_vocab(with_added_tokens=True)
    largest = max(known.values(), default=-1)
    if largest >= rows:
        name = tokenizer.id_to_token(largest)
        raise ConfigError(f"{source}: token {name!r} has id {largest}, the model's table has {rows} rows")
    # In the order of the released ids, behind the last token there is.
    new = [name for name in SPECIAL_TOKENS if name not in known]
    if largest + 1 + len(new) > rows:
        raise ConfigError(
            f"{source}: {len(new)} special tokens need free rows, but of the table's {rows} only "
            f"{rows - largest - 1} come after the last token"
        )
    tokenizer = _with_special_tokens(tokenizer, new)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = {name: vocabulary[name] for name in SPECIAL_TOKENS}
    if sorted(ids[name] for name in new) != list(range(largest + 1, largest + 1 + len(new))):
        raise ConfigError(f"{source}: its ids leave gaps, which special tokens would fall into")
    tokens = SpecialTokens(**{field: ids[name] for field, name in MODEL_TOKENS.items()})
    return TextVocabulary(
        tokenizer.to_str(), tokens, np.unique(list(known.values())), {name: ids[name] for name in new}
    )


def _open(folder: Path) -> tuple[Tokenizer, Path]:
    """Opens the tokenizer; returns it with the file that it was made of."""
    if (folder / TOKENIZER).is_file():
        tokenizer, source = load_tokenizer(folder / TOKENIZER), folder / TOKENIZER
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        tokenizer, source = _from_merges(folder), folder / VOCABULARY
    else:
        raise ConfigError(f"{folder} holds no tokenizer: neither {TOKENIZER} nor {VOCABULARY} and {MERGES}")
    # What the configuration says of added tokens holds for either form.
    for name, number in _stated_tokens(folder).items():
        if (found := tokenizer.token_to_id(name)) != number:
            has = "does not have it" if found is None else f"gives it id {found}"
            raise ConfigError(f"{folder / CONFIG}: token {name!r} has id {number}, but {source.name} {has}")
    return tokenizer, source


def _from_merges(folder: Path) -> Tokenizer:
    """Makes the tokenizer of `vocab.json` and `merges.txt`, with the added tokens that the configuration lists."""
    refuse_stand_in(folder / MERGES)
    vocabulary = read_json_object(folder / VOCABULARY)
    for name, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise ConfigError(f"{folder / VOCABULARY}: token {name!r} has no id but {number!r}")
    try:
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
        # The first line may say the version; a merge is two tokens and a space.
        pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / MERGES} cannot be read: {error}") from error
    # `tokenizers` does not return from a merge of tokens that are not there.
    for left, _, right in pairs:
        if not {left, right, left + right} <= vocabulary.keys():
            raise ConfigError(f"{folder / MERGES}: '{left} {right}' joins no two tokens of {VOCABULARY} to a third")
    merges = [(left, right) for left, _, right in pairs]
    try:
        tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"{folder / VOCABULARY} cannot be read as a vocabulary: {error}") from error
    # By id, which is how `tokenizers` numbers them.
    stated = sorted(_stated_tokens(folder).items(), key=lambda pair: pair[1])
    tokenizer.add_special_tokens(added_tokens(name for name, _ in stated))
    return tokenizer


def _stated_tokens(folder: Path) -> dict[str, int]:
    """Reads the added tokens of `tokenizer_config.json` by id; empty where it lists none."""
    if not (folder / CONFIG).exists():
        return {}
    listed = read_json_object(folder / CONFIG).get("added_tokens_decoder") or {}
    wrong = f"{folder / CONFIG}: added_tokens_decoder must map ids to tokens"
    if not isinstance(listed, dict):
        raise ConfigError(f"{wrong}, it is of type {type(listed).__name__}")
    stated = {}
    for number, token in listed.items():
        name = token.get("content") if isinstance(token, dict) else None
        if not number.isdecimal() or not isinstance(name, str):
            raise ConfigError(f"{wrong}, not {number!r} to {token!r}")
        stated[name] = int(number)
    return stated


def _gives_back(tokenizer: Tokenizer, text: str) -> bool:
    """Tells whether a text comes back from its tokens."""
    try:
        return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    except Exception:  # tokenizers raises plain Exception, for a word that a model of words does not have
        return False


def _with_special_tokens(tokenizer: Tokenizer, new: list[str]) -> Tokenizer:
    """Adds the tokens `new`; those of ours that are there already become special, as names in strangers' text are."""
    values = json.loads(tokenizer.to_str())
    for token in values["added_tokens"]:
        if token["content"] in SPECIAL_TOKENS:
            token |= {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    tokenizer = Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
    tokenizer.add_special_tokens(added_tokens(new))
    return tokenizer
