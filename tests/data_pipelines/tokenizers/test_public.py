"""The tokenizer of a public language model: read in either form, and given every special token of ours."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from baichuan_omni_jax.config.model import SpecialTokens
from data_pipelines.tokenizers.public import read_vocabulary
from data_pipelines.tokenizers.tokenizer import SPECIAL_TOKENS, plain_tokenizer, tokenizer_from_ranks
from tests.helpers.golden import ranks_path
from tests.helpers.public_models import OWN_TOKENS, ROWS, TEXT, own_tokenizer


def write(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_ids_stay_and_new_tokens_follow(tmp_path):
    vocabulary = read_vocabulary(write(tmp_path / "llm", own_tokenizer()), ROWS)
    assert vocabulary.known.tolist() == list(range(303))
    new = [name for name in SPECIAL_TOKENS if name not in OWN_TOKENS]
    assert vocabulary.added == {name: 303 + i for i, name in enumerate(new)}
    assert vocabulary.tokens.end_of_text == 300
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json)
    assert tokenizer.encode(TEXT).ids == own_tokenizer().encode(TEXT).ids
    assert tokenizer.encode("<C_Q>a<img_pad_baichuan>").ids == [
        vocabulary.added["<C_Q>"],
        *own_tokenizer().encode("a").ids,
        vocabulary.tokens.image_pad,
    ]


def test_both_forms_of_a_tokenizer_are_one(tmp_path):
    """`vocab.json` and `merges.txt`, with the special tokens in `tokenizer_config.json`, as older folders have them."""
    whole = read_vocabulary(write(tmp_path / "whole", own_tokenizer()), ROWS)
    folder = tmp_path / "pieces"
    folder.mkdir()
    own_tokenizer().model.save(str(folder))
    listed = {str(own_tokenizer().token_to_id(name)): {"content": name, "special": True} for name in OWN_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    pieces = read_vocabulary(folder, ROWS)
    assert pieces.added == whole.added
    assert pieces.tokens == whole.tokens
    assert Tokenizer.from_str(pieces.tokenizer_json).encode(TEXT).ids == own_tokenizer().encode(TEXT).ids


def test_names_that_were_plain_tokens_become_special(tmp_path):
    """Qwen2.5 has `<tool_call>` as an ordinary added token: in text that strangers write it must be text."""
    own = own_tokenizer()
    own.add_tokens([AddedToken("<tool_call>", special=False, normalized=True)])
    vocabulary = read_vocabulary(write(tmp_path / "llm", own), ROWS)
    tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json)
    assert tokenizer.encode("<tool_call>").ids == [303]
    assert plain_tokenizer(tokenizer).encode("<tool_call>").ids != [303]
    assert "<tool_call>" not in vocabulary.added


@pytest.mark.parametrize("rows", [151936, 152064])
def test_qwen25_gets_the_ids_of_the_release(tmp_path, rows):
    """Its 22 special tokens are the first of ours."""
    folder = write(tmp_path / "llm", tokenizer_from_ranks(ranks_path(), SPECIAL_TOKENS[:22]))
    vocabulary = read_vocabulary(folder, rows)
    assert asdict(vocabulary.tokens) == asdict(SpecialTokens())
    assert list(vocabulary.added.values()) == list(range(151665, 151702))
