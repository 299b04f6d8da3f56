"""seqio tasks with our vocabulary, cached to a data set that a process without TensorFlow trains from."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest

from tests.helpers.proofs import HANG

seqio = pytest.importorskip("seqio", reason="needs the extra seqio (Python 3.11)")

import tensorflow as tf  # noqa: E402

from baichuan_omni_jax.config import tiny  # noqa: E402
from baichuan_omni_jax.errors import ConfigError  # noqa: E402
from data_pipelines.datasets.importers.seqio_cache import Recipe, cache, deal, main  # noqa: E402
from data_pipelines.datasets.importers.seqio_vocabulary import OmniVocabulary, plain  # noqa: E402
from data_pipelines.datasets.jobs.runners import LocalRunner  # noqa: E402
from data_pipelines.datasets.shards import open_dataset  # noqa: E402
from data_pipelines.documents.processor import Processor  # noqa: E402
from data_pipelines.documents.prompts import NAMES, escape  # noqa: E402
from data_pipelines.tokenizers.tokenizer import encode, load_tokenizer, plain_tokenizer, train_tokenizer  # noqa: E402
from tests.helpers.micro import CONFIG, REPOSITORY, environment, read_metrics  # noqa: E402

MODULE = "data_pipelines.datasets.importers.seqio_tasks"
TEXTS = ["Plain words.", "三加九等于十二。", "a\tb\n\n  c", "<C_Q>Hi<C_A>Hello<|endoftext|>", "naïve café 12345", ""]


@pytest.fixture(scope="module")
def root(sample_dir, tmp_path_factory):
    """The sample's text, TFRecords of its questions, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("seqio")
    shutil.copy(sample_dir / "text.jsonl", folder)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open(encoding="utf-8")]
    train_tokenizer(texts, tiny().llm.vocab_size).save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMNI_SEQIO_DATA", str(folder))
        patch.setenv("OMNI_TOKENIZER", str(folder / "tokenizer.json"))
        importlib.import_module(MODULE).write_questions(folder)
        yield folder


@pytest.fixture(scope="module")
def recipe(root):
    return Recipe("omni_mixture", (MODULE,), str(root / "tokenizer.json"))


@pytest.fixture(scope="module")
def cached(recipe, root):
    """2000 documents in two shards."""
    return root / "mixture", cache(recipe, root / "mixture", 2000, 2, LocalRunner(0))


@pytest.fixture(scope="module")
def vocabulary(root):
    return OmniVocabulary(load_tokenizer(root / "tokenizer.json"))


def test_the_vocabulary_is_our_tokenizer(vocabulary):
    for text in TEXTS:
        ids = encode(vocabulary.tokenizer, text)
        assert list(vocabulary.encode(text)) == ids
        assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
        assert vocabulary.decode(ids) == vocabulary.tokenizer.decode(ids, skip_special_tokens=False)
        if ids:
            assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == vocabulary.decode(ids)
    assert vocabulary.decode(encode(vocabulary.tokenizer, TEXTS[1])) == TEXTS[1]


def test_the_vocabularys_numbers(vocabulary):
    assert vocabulary.vocab_size == vocabulary.tokenizer.get_vocab_size()
    assert vocabulary.eos_id == vocabulary.tokenizer.token_to_id("<|endoftext|>")
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.extra_ids) == (None, None, 0)
    assert vocabulary == OmniVocabulary(vocabulary.tokenizer)
    assert vocabulary != OmniVocabulary(train_tokenizer(["x"], 320))


def test_text_that_somebody_wrote_stays_text(vocabulary):
    """The same as in documents; ids as chat has them."""
    ids_of_plain = plain_tokenizer(vocabulary.tokenizer)
    for text in [*TEXTS, *NAMES, "a <C_A>b<literal_omni> <|endoftext|>", "<<C_Q>>", "<trainable_start>x</tool_call>"]:
        escaped = plain(tf.constant(text)).numpy().decode()
        assert escaped == escape(text)
        assert list(vocabulary.encode(escaped)) == encode(ids_of_plain, text)
    tokens = vocabulary.encode("<C_Q>" + escape("Who is <C_A>?") + "<C_A>")
    marks = [vocabulary.tokenizer.token_to_id(name) for name in ("<C_Q>", "<C_A>")]
    assert list(tokens) == [marks[0], *encode(ids_of_plain, "Who is <C_A>?"), marks[1]]


def test_decoding_stops_at_the_end(vocabulary):
    ids = [*encode(vocabulary.tokenizer, "one"), vocabulary.eos_id, *encode(vocabulary.tokenizer, "two")]
    assert vocabulary.decode(ids) == "one<|endoftext|>"


def test_bytes_that_are_no_text_become_a_sign(vocabulary):
    ids = vocabulary.encode_tf(tf.constant(b"a\xffb")).numpy().tolist()
    assert ids == encode(vocabulary.tokenizer, "a\ufffdb")


def test_tasks_are_dealt_by_their_rates():
    dealt = list(deal({"a": 0.7, "b": 0.2, "c": 0.1}, 1000))
    assert [dealt.count(task) for task in "abc"] == [700, 200, 100]
    for stop in range(1, 1000, 37):
        assert abs(dealt[:stop].count("a") - 0.7 * stop) <= 2


def test_sampled_rates_are_within_2_percent(cached):
    """Counted in what was written, not in what was reported."""
    folder, summary = cached
    dataset = open_dataset(folder)
    types = [document.type for shard in range(2) for document in dataset.documents_of(shard)]
    assert len(types) == 2000 == summary["documents"]
    for task, share in {"omni_text": 0.75, "omni_questions": 0.25}.items():
        assert types.count(task) / 2000 == pytest.approx(share, rel=0.02)


def test_documents_hold_the_ids_of_their_text(cached, root):
    """Through the processor: the sequences of the text that the tasks read."""
    processor = Processor(tiny(), load_tokenizer(root / "tokenizer.json"))
    tasks, dataset = importlib.import_module(MODULE), open_dataset(cached[0])
    texts = {tuple(encode(processor.tokenizer, text)) for text in tasks.read_texts(root)}
    seen = set()
    for document in dataset.documents_of(0):
        encoded = processor.encode(document, None)
        *ids, end = encoded.tokens.tolist()
        assert end == processor.config.tokens.end_of_text
        learned = encoded.text_weights.sum()
        seen.add(document.type)
        if document.type == "omni_text":
            assert tuple(ids) in texts
            assert learned == len(ids)  # the first token is not predicted, the end is
        else:
            assert processor.tokenizer.decode(ids, skip_special_tokens=False).startswith("<C_Q>")
            assert 0 < learned < len(ids)
    assert seen == set(tasks.RATES)


def test_a_stopped_job_goes_on_and_ends_with_the_same_shards(cached, recipe, tmp_path):
    folder, _ = cached
    copy = shutil.copytree(folder, tmp_path / "mixture")
    (copy / "dataset.json").unlink()
    (copy / "documents-00001.array_record").unlink()
    kept = (copy / "documents-00000.array_record").stat().st_mtime_ns
    cache(recipe, copy, 2000, 2, LocalRunner(0))
    assert (copy / "documents-00000.array_record").stat().st_mtime_ns == kept
    assert (copy / "dataset.json").read_text() == (folder / "dataset.json").read_text()


def test_a_task_alone_is_read_once(root, recipe, tmp_path):
    summary = cache(Recipe("omni_text", (MODULE,), recipe.tokenizer), tmp_path / "text", None, 3, LocalRunner(0))
    assert summary["documents"] == len((root / "text.jsonl").read_text(encoding="utf-8").splitlines())


def test_what_is_wrong_is_one_sentence(root, recipe, tmp_path, capsys):
    for change, message in {
        "mixture": "no task or mixture 'x' is registered; there are omni_mixture, omni_questions, omni_text",
        "split": "task omni_questions has no split 'x'; it has train",
    }.items():
        with pytest.raises(ConfigError, match=message):
            cache(Recipe(**(recipe.__dict__ | {change: "x"})), tmp_path / "out", 10, 1, LocalRunner(0))
    with pytest.raises(ConfigError, match="omni_mixture is a mixture, which has no end"):
        cache(recipe, tmp_path / "out", None, 1, LocalRunner(0))
    other = tmp_path / "other.json"
    train_tokenizer(["x"], 320).save(str(other))
    arguments = [
        "--mixture",
        "omni_text",
        "--module",
        MODULE,
        "--tokenizer",
        str(other),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 2
    assert "task omni_text: inputs has another vocabulary than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"is not empty and holds 'other\.json', which this program did not write"):
        cache(recipe, tmp_path, 10, 1, LocalRunner(0))


# Raises when anything asks for TensorFlow, and tells at the end that it is not there.
WITHOUT_TENSORFLOW = """
import importlib.abc, importlib.machinery, runpy, sys
class Blocked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets"):
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")
    def exec_module(self, module):
        raise ImportError
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"tensorflow", "seqio"})
    print("modules of TensorFlow:", loaded)
"""


@pytest.mark.slow
def test_a_run_trains_from_the_cache_without_tensorflow(cached, root, tmp_path):
    mixture = json.dumps([{"name": "text", "manifest": "mixture"}])
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(REPOSITORY / "launch" / "tpu_pretrain.py")]
    command += ["--config", str(CONFIG), "--workdir", str(tmp_path / "run")]
    changes = [
        f"data.root={root}",
        "data.sample=false",
        f"data.mixture={mixture}",
        f"data.tokenizer={root}/tokenizer.json",
    ]
    command += [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, check=False, env=environment(tmp_path / "xla")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "modules of TensorFlow: []" in done.stdout
    losses = [row["loss_text"] for row in read_metrics(tmp_path / "run")]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
