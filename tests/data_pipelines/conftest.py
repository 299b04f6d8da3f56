"""Pipelines over the sample data set, with random codes: opened once for all tests of this folder."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, DataConfig, SourceConfig, tiny
from data_pipelines.audio_codes.store import CodeStore
from data_pipelines.audio_codes.writer import write_codes
from data_pipelines.pipeline import Pipeline, open_pipeline
from tests.helpers.windows import windows_of

SOURCES = {"text": 2.0, "image": 2.0, "video": 1.0, "audio": 3.0, "omni": 2.0}
BUDGETS = Budgets(tokens=512, patches=768, audio_frames=192, audio_targets=96)


def random_codes(pipeline: Pipeline):
    """(key, codes) of every window of audio in the mixture."""
    rng = np.random.default_rng(0)
    sizes = pipeline.omni.audio.codebook_sizes
    for key, item in windows_of(pipeline).items():
        yield key, rng.integers(0, sizes, (item.window.code_frames, len(sizes)))


def store_codes(pipeline: Pipeline, path) -> CodeStore:
    sizes = pipeline.omni.audio.codebook_sizes
    write_codes(path, random_codes(pipeline), fingerprint="random", codebook_sizes=sizes, window_rule={})
    return CodeStore(path, "random")


def with_config(pipeline: Pipeline, **changes) -> Pipeline:
    """The same indexes read with another `DataConfig`."""
    return dataclasses.replace(pipeline, config=dataclasses.replace(pipeline.config, **changes))


@pytest.fixture(scope="session")
def sample_root(sample_dir, tmp_path_factory):
    """The sample data set again (hard links), where indexes may be cached."""
    return shutil.copytree(sample_dir, tmp_path_factory.mktemp("root") / "data", copy_function=os.link)


@pytest.fixture(scope="session")
def sample_pipeline(sample_root):
    """The sample mixture in rows of 512, two a step, decoded in this process."""
    mixture = tuple(SourceConfig(name=name, manifest=f"{name}.jsonl", weight=w) for name, w in SOURCES.items())
    config = DataConfig(root=str(sample_root), mixture=mixture, rows=2, budgets=BUDGETS, workers=0)
    return open_pipeline(config, tiny())


@pytest.fixture(scope="session")
def sample_codes(sample_pipeline, tmp_path_factory):
    """Random codes for all sound of the sample data set."""
    return store_codes(sample_pipeline, tmp_path_factory.mktemp("codes") / "store")
