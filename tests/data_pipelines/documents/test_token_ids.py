"""Documents whose text is tokenized already: the same sequence as from text, and no other tokenizer."""

import json

import numpy as np
import pytest

from baichuan_omni_jax.config import DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.datasets.builder.build import build_dataset
from data_pipelines.datasets.shards import ShardFile, ShardWriter, open_dataset, write_description
from data_pipelines.documents.document import Document, pack_ids, read_ids
from data_pipelines.documents.processor import Processor
from data_pipelines.documents.prompts import TextElement, TokensElement, parse_prompt
from data_pipelines.errors import SampleError
from data_pipelines.media.location import Media, MediaReference
from data_pipelines.packing.index import load_index
from data_pipelines.tokenizers.tokenizer import encode, tokenizer_fingerprint, train_tokenizer
from data_pipelines.tools.commands import make_runner
from data_pipelines.tools.row_views import SlotContent, describe
from data_pipelines.tools.validate import validate

QUESTION, ANSWER = "<C_Q>Which animal says meow?<C_A>", "The cat says meow."
TAGS = (
    '<tokens_start_omni>{"path": "inputs"}<tokens_end_omni><trainable_start>'
    '<tokens_start_omni>{"path": "targets"}<tokens_end_omni><trainable_end>'
)


@pytest.fixture(scope="module")
def processor():
    return Processor(tiny(), train_tokenizer([QUESTION, ANSWER], tiny().llm.vocab_size))


def tokenised(processor: Processor, answer: str = ANSWER) -> tuple[Document, dict[str, bytes]]:
    ids = {"inputs": encode(processor.tokenizer, QUESTION), "targets": encode(processor.tokenizer, answer)}
    data = {name: pack_ids(each, processor.tokenizer_fingerprint) for name, each in ids.items()}
    return Document("a", "", TAGS, "here", {name: Media(name, None, each) for name, each in data.items()}), data


def test_tags_of_ids_are_elements():
    assert parse_prompt(f"A{TAGS}") == [
        TextElement("A"),
        TokensElement(MediaReference(path="inputs")),
        TokensElement(MediaReference(path="targets"), trainable=True),
    ]
    assert describe(parse_prompt(TAGS)[1]) == (SlotContent.TEXT, "[targets: token ids]", True)


@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
def test_ids_give_the_sequence_of_their_text(processor, ending):
    document, _ = tokenised(processor, ANSWER + ending)
    text = f"{QUESTION}<trainable_start>{ANSWER}{ending}<trainable_end>"
    one, other = (processor.encode(each, None) for each in (document, Document("b", "", text, "there", {})))
    for name in ("tokens", "text_targets", "text_weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert processor.measure(document).tokens == len(one.tokens)


@pytest.mark.parametrize(
    ("content", "cause", "told"),
    [
        (pack_ids([1, 2], "0" * 32), "other_tokenizer", "holds ids of tokenizer 0000"),
        (bytes(15), "unreadable_media", "it is cut"),
        (bytes.fromhex("ab" * 16) + bytes(5), "unreadable_media", "is not a readable list of token ids"),
        (pack_ids([1, 900], "ab" * 16), "unreadable_media", "ids outside the vocabulary"),
        (pack_ids([-1], "ab" * 16), "unreadable_media", "ids outside the vocabulary"),
    ],
)
def test_ids_that_cannot_be_used(content, cause, told):
    with pytest.raises(SampleError, match=told) as error:
        read_ids(Media("targets", None, content), "ab" * 16, 900)
    assert error.value.cause == cause


def test_ids_in_files_are_built_and_validated(processor, tmp_path):
    """Text that is tokenized already is no medium, and whose ids they are is for the run to say."""
    for name, data in tokenised(processor)[1].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "cut").write_bytes(b"no ids")
    lines = [json.dumps({"text": TAGS.replace("inputs", name)}) for name in ("inputs", "cut")]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    runner = make_runner("local", 0)
    told = build_dataset([tmp_path / "m.jsonl"], tmp_path / "out", None, 10, 1 << 20, runner)
    assert (told["documents"], told["characters"], told["sounds"]) == (2, 0, 0)
    (problem,) = validate(open_dataset(tmp_path / "out"), runner)
    assert (problem.id, problem.cause) == ("m-2", "unreadable_media")
    assert "cut is not a readable list of token ids: it is cut" in problem.message


def test_a_data_set_of_another_tokenizer_is_refused(processor, tmp_path):
    document, media = tokenised(processor)
    (tmp_path / "mix").mkdir()
    with ShardWriter(tmp_path / "mix" / "documents-00000.array_record") as writer:
        writer.write(document, media)
    shard = ShardFile("documents-00000.array_record", 1, 0, "0")
    write_description(tmp_path / "mix", [shard], {"tokenizer": processor.tokenizer_fingerprint})
    config, source = DataConfig(root=str(tmp_path)), SourceConfig(name="a", manifest="mix")
    assert load_index(config, source, processor).usable == 1
    other = Processor(tiny(), train_tokenizer(["Something else."], tiny().llm.vocab_size))
    assert tokenizer_fingerprint(other.tokenizer) != processor.tokenizer_fingerprint
    with pytest.raises(
        ConfigError, match=r"source a: .*mix holds token ids of tokenizer .*: set data.tokenizer to the"
    ):
        load_index(config, source, other)
