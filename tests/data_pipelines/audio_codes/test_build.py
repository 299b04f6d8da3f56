"""Building a store of codes for mixtures: what is there is kept, what is missing is made, failures are reported."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from data_pipelines.audio_codes.build import CodeBuildOptions, CodeEncoder, open_or_build, store_path
from data_pipelines.audio_codes.store import REFERENCE, CodeStore
from data_pipelines.audio_codes.windows import ClipSource, MelReader, clip_sources, listed, listing_job
from data_pipelines.datasets.jobs.job import run_job
from data_pipelines.datasets.jobs.runners import LocalRunner
from data_pipelines.errors import SampleError
from data_pipelines.pipeline import Pipeline, open_pipeline
from tests.data_pipelines.datasets.test_jobs import alive, wait_for
from tests.helpers.windows import windows_of

REPOSITORY = Path(__file__).resolve().parents[3]
AUDIO = tiny().audio
BUDGETS = Budgets(tokens=512, patches=768, audio_frames=192, audio_targets=96)


def codes_of(mel: np.ndarray) -> np.ndarray:
    """Some codes that only this mel has."""
    frames = AUDIO.bridge_length(mel.shape[1])
    seeds = np.abs(mel[:, :frames].sum(0) * 1000).astype(np.int64)[:, None] + np.arange(AUDIO.levels)
    return (seeds % np.array(AUDIO.codebook_sizes)).astype(np.int32)


class Encoder:
    """Encodes in no particular order and remembers how much."""

    def __init__(self):
        self.windows = 0

    def __call__(self, windows):
        for row, mel in reversed(list(windows)):
            self.windows += 1
            yield row, codes_of(mel)


@pytest.fixture(scope="module")
def root(micro_root, tmp_path_factory):
    """A few documents; nothing cached."""
    copy = tmp_path_factory.mktemp("filling") / "data"
    return shutil.copytree(micro_root, copy, copy_function=os.link, ignore=shutil.ignore_patterns(".cache"))


def pipeline_of(root, *names: str) -> Pipeline:
    mixture = tuple(SourceConfig(name=name, manifest=f"{name}.jsonl") for name in names)
    return open_pipeline(DataConfig(root=str(root), mixture=mixture, budgets=BUDGETS, workers=0, tokenizer=""), tiny())


@pytest.fixture(scope="module")
def pipeline(root) -> Pipeline:
    return pipeline_of(root, "omni", "text")


@pytest.fixture
def fill(tmp_path):
    """Fills a store in the test's own folder: (store, windows that were encoded)."""

    def run(*pipelines: Pipeline, workers=0, fingerprint="abc", **options) -> tuple[CodeStore, int]:
        encoder, settings = Encoder(), CodeBuildOptions(workers, part_frames=512, report=lambda _: None)
        tokenizer = CodeEncoder(fingerprint, encoder)
        return open_or_build(tmp_path / "store", pipelines, tokenizer, settings, **options), encoder.windows

    return run


def keys_of(pipeline: Pipeline) -> set:
    return set(windows_of(pipeline))


def test_every_window_of_the_mixture_gets_its_codes(pipeline, fill):
    store, encoded = fill(pipeline)
    assert encoded == len(store) == len(keys_of(pipeline)) > 10
    assert len(store.meta["parts"]) > 1
    for key, item in windows_of(pipeline).items():
        assert store.lookup(key).shape == (item.window.code_frames, AUDIO.levels)
    table = listed(_listing(pipeline, store.path), store.index[:0])
    with MelReader(clip_sources([pipeline]), AUDIO, 0) as mels:
        for row, mel in mels(table):
            key = (f"{table['high'][row]:016x}{table['low'][row]:016x}" + "0" * 32, int(table["window"][row]))
            np.testing.assert_array_equal(store.lookup(key), codes_of(mel))


def _listing(pipeline: Pipeline, path):
    job = listing_job([pipeline], path / "listing", documents=7)
    run_job(job, LocalRunner(0), report=lambda _: None)
    return job


def test_a_filled_store_is_opened_as_it_is(pipeline, fill):
    first, _ = fill(pipeline)
    again, encoded = fill(pipeline)
    assert encoded == 0
    assert again.meta == first.meta
    assert fill(pipeline, relist=True)[1] == 0
    with pytest.raises(ConfigError, match="was written by tokenizer abc, not by xyz, the one in use"):
        fill(pipeline, fingerprint="xyz")
    leftovers = {path.name for path in again.path.rglob(".*")}
    assert leftovers == {".lock"}


def test_another_mixture_adds_what_is_new(root, fill):
    omni, both = pipeline_of(root, "omni"), pipeline_of(root, "audio", "omni")
    small, before = fill(omni)
    parts = {name: (small.path / "frames" / name).read_bytes() for name in small.meta["parts"]}
    large, added = fill(both)
    assert before == len(keys_of(omni))
    assert before + added == len(keys_of(both)) == len(large)
    assert all((large.path / "frames" / name).read_bytes() == content for name, content in parts.items())
    for key in keys_of(omni):
        np.testing.assert_array_equal(small.lookup(key), large.lookup(key))
    large.verify()


@pytest.mark.slow
def test_held_out_documents_share_the_store(root, fill):
    audio, omni = pipeline_of(root, "audio"), pipeline_of(root, "omni")
    store, _ = fill(audio, omni)
    assert all(key in store for key in keys_of(audio) | keys_of(omni))
    assert fill(omni)[1] == 0


@pytest.mark.slow
def test_parts_are_the_same_whatever_the_workers(pipeline, fill, monkeypatch):
    monkeypatch.setattr("data_pipelines.audio_codes.build.WORTH_WORKERS", 0)
    store, _ = fill(pipeline, workers=2)
    whole = store.meta
    shutil.rmtree(store.path)
    assert fill(pipeline)[0].meta == whole


def test_each_tokenizer_has_a_store_of_its_own(pipeline):
    paths = {store_path(pipeline, CodeEncoder(letter * 32, Encoder())) for letter in "ab"}
    assert len(paths) == 2
    assert all(path.parent == pipeline.cache for path in paths)


def test_windows_without_codes_are_named_and_left_out(pipeline, tmp_path, caplog):
    def encode(windows):
        """One code frame too few for the first window."""
        for row, mel in windows:
            yield row, codes_of(mel)[: None if row else -1]

    settings = CodeBuildOptions(report=lambda _: None)
    with caplog.at_level(logging.WARNING):
        store = open_or_build(tmp_path / "store", [pipeline], CodeEncoder("abc", encode), settings)
    key, item = next(iter(windows_of(pipeline).items()))
    assert len(store) == len(keys_of(pipeline)) - 1
    assert key not in store
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("no codes for a window of audio of omni.jsonl:")
    assert f"(changed): it gives {item.window.code_frames - 1} code frames" in message


@pytest.mark.slow
def test_no_decoder_outlives_a_killed_program(tmp_path):
    """Its workers have nothing to do when it is killed: they wait for a next task, which never comes."""
    code = (
        "from data_pipelines.audio_codes.windows import MelReader, _Task\n"
        "from baichuan_omni_jax.config import tiny\n"
        "if __name__ == '__main__':\n"
        "    reader = MelReader((), tiny().audio, 2)\n"
        "    reader._submit(_Task(0, 0, (), ())).exception()\n"
        "    print(*reader._pool._processes, flush=True)\n"
        "    input()\n"
    )
    (tmp_path / "script.py").write_text(code)
    command, where = [sys.executable, str(tmp_path / "script.py")], {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=os.environ | where, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        workers = [int(number) for number in program.stdout.readline().split()]
        assert workers
        assert all(map(alive, workers))
        program.kill()
    wait_for(lambda: not any(map(alive, workers)))


def test_mels_say_why_there_is_none(pipeline):
    """A clip that is not what was listed."""
    source = clip_sources([pipeline])[0]
    number = int(source.with_audio(0, len(source))[0])
    table = np.array([(1, 2, 0, 5, 0, number)], REFERENCE)
    with MelReader((source,), AUDIO, 0) as mels:
        ((row, why),) = list(mels(table))
    assert row == 0
    assert isinstance(why, SampleError)
    assert why.cause == "changed"


class Deadly(ClipSource):
    """A source one of whose documents ends the process that decodes it."""

    def items(self, number):
        if number == self.deadly:
            os._exit(1)
        return super().items(number)


@pytest.mark.slow
def test_a_decoder_that_ends_its_process_costs_its_own_windows(pipeline):
    source = clip_sources([pipeline])[0]
    numbers = source.with_audio(0, len(source)).tolist()
    deadly = Deadly(source.index, source.processor)
    object.__setattr__(deadly, "deadly", numbers[2])
    keys = [(number, item) for number in numbers for item in source.items(number)]
    table = np.array(
        [(int(i.key[0][:16], 16), int(i.key[0][16:32], 16), i.key[1], 1, 0, n) for n, i in keys], REFERENCE
    )
    with MelReader((deadly,), AUDIO, 2) as mels:
        outcomes = list(mels(table))
    assert [row for row, _ in outcomes] == list(range(len(table)))
    lost = [row for row, outcome in outcomes if isinstance(outcome, SampleError)]
    assert lost == [row for row in range(len(table)) if table["document"][row] == numbers[2]]
    assert "ends the process" in str(outcomes[lost[0]][1])


def test_parts_of_no_whole_chunks_are_refused(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="a part's 100 frames must be a multiple of 512"):
        open_or_build(tmp_path / "s", [pipeline], CodeEncoder("a", Encoder()), CodeBuildOptions(part_frames=100))
