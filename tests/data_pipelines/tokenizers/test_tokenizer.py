"""Tokenizers: trained here, read from disk, built from released ranks."""

import json
from dataclasses import replace

import pytest

from baichuan_omni_jax.config import OmniConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.tokenizers.tokenizer import (
    ASSISTANT,
    SPECIAL_TOKENS,
    USER,
    check_tokenizer,
    encode,
    load_tokenizer,
    tokenizer_from_ranks,
    train_tokenizer,
)
from tests.helpers.golden import golden_path, ranks_path

TEXTS = [
    "A cat sat on the mat, and the cat was glad.",
    "一只猫坐在垫子上。猫很高兴。",
    "<C_Q>Where is the cat?<C_A>On it.",
] * 5


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 400)


def test_special_tokens_come_first(trained):
    assert [trained.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(59))
    assert 59 + 256 < trained.get_vocab_size() <= 400
    check_tokenizer(trained, tiny())


def test_training_is_deterministic(trained):
    assert train_tokenizer(iter(TEXTS), 400).to_str() == trained.to_str()


def test_every_text_comes_back(trained):
    for text in (*TEXTS, "  two  spaces\r\n\n\ttab 12345 don't", "emoji 😀 and ñ", ""):
        assert trained.decode(encode(trained, text), skip_special_tokens=False) == text


def test_text_is_composed_before_it_is_cut(trained):
    assert encode(trained, "n\u0303") == encode(trained, "ñ")


def test_special_names_in_text_become_their_ids(trained):
    ids = encode(trained, f"{USER}cat{ASSISTANT}")
    assert (ids[0], ids[-1]) == (SPECIAL_TOKENS.index(USER), SPECIAL_TOKENS.index(ASSISTANT))
    assert encode(trained, "< C_Q>")[0] != ids[0]


def test_saved_and_loaded(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == trained.to_str()
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            load_tokenizer(tmp_path / name)


def test_too_small_a_vocabulary():
    with pytest.raises(ConfigError, match="at least 315 entries, not 300"):
        train_tokenizer(TEXTS, 300)


def test_a_tokenizer_of_another_model_is_refused(trained):
    with pytest.raises(ConfigError, match=r"tokens.end_of_text is 151643, but the tokenizer gives it id 0"):
        check_tokenizer(trained, OmniConfig())
    config = tiny()
    moved = replace(config, tokens=replace(config.tokens, audio_pad=40))
    with pytest.raises(ConfigError, match=r"tokens.audio_pad is 40, .* id 35 \(<audio_pad_baichuan>\)"):
        check_tokenizer(trained, moved)
    small = replace(config, llm=replace(config.llm, vocab_size=330))
    with pytest.raises(ConfigError, match=r"outside llm.vocab_size 330"):
        check_tokenizer(trained, small)


def test_released_ranks_give_the_released_ids():
    tokenizer = tokenizer_from_ranks(ranks_path())
    check_tokenizer(tokenizer, OmniConfig())
    released = json.loads(golden_path("processor/added_tokens.json").read_text())["added_tokens"]
    assert {name: tokenizer.token_to_id(name) for name in released} == released
    prompts = json.loads(golden_path("processor/processor.json").read_text(encoding="utf-8"))["prompts"]
    for name in ("text_en", "text_zh", "text_mixed_special"):
        assert encode(tokenizer, prompts[name]["prompt"]) == prompts[name]["input_ids"], name


def test_ranks_of_a_few_tokens(tmp_path):
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b" ab"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    path = tmp_path / "ranks"
    path.write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = tokenizer_from_ranks(path)
    assert encode(tokenizer, "abc ab b<C_Q>") == [257, 258, 32, 98, 259 + SPECIAL_TOKENS.index("<C_Q>")]
    path.write_bytes(b"\n".join(lines[:-1]))
    assert encode(tokenizer_from_ranks(path), " ab") == [32, 256]
    for content, message in (
        (b"!!! 0", "is no file"),
        (lines[1], "are not 0 to 0"),
        (lines[0] + b"\nYWFh 1", "no join"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            tokenizer_from_ranks(path)
