"""A workdir remembers the checkpoints it started from, and a run finds the tokenizer of its weights."""

import json

import pytest
from etils import epath

from baichuan_omni_jax.checkpoint import (
    Parent,
    find_parent,
    initial_tokenizer,
    parent_data_state,
    record_parent,
    stored_tokenizer,
)
from baichuan_omni_jax.checkpoint.run_config import store_run_config
from baichuan_omni_jax.config import ConfigError, DataConfig, ImagesConfig, RunConfig
from baichuan_omni_jax.omni import loading


def checkpoint(folder: epath.Path, **trained: int) -> epath.Path:
    (folder / "processor").mkdir(parents=True)
    (folder / "processor" / "tokenizer.json").write_text("{}")
    info = {name: {"parameters": 1, "dtype": "float32", "trained": steps} for name, steps in trained.items()}
    (folder / "branches.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def stage(tmp_path) -> epath.Path:
    """A finished stage's workdir: step 4 is committed, step 8 is not."""
    workdir = epath.Path(tmp_path / "stage")
    for step in ("4", "8"):
        checkpoint(workdir / "checkpoints" / step, llm=int(step), vision=0)
    (workdir / "checkpoints" / "4" / "checksums.json").write_text("{}")
    (workdir / "run_config.json").write_text(json.dumps({"name": "first"}))
    return workdir


def test_parent_is_the_newest_committed_step_and_is_written_once(stage, tmp_path):
    folder = str(stage / "checkpoints" / "4")
    parent = find_parent(tmp_path, str(stage), ("llm", "vision"))
    assert parent == Parent({"llm": folder, "vision": folder}, {folder: "first"}, {"llm": 4, "vision": 0})
    record_parent(tmp_path, parent)
    # The parent trained on, or is gone: what this workdir started from stays.
    (stage / "checkpoints" / "8" / "checksums.json").write_text("{}")
    record_parent(tmp_path, find_parent(tmp_path, "nowhere", ("llm", "vision")))
    assert find_parent(tmp_path, "nowhere", ("llm", "vision")) == parent


def test_random_weights_have_no_parent(tmp_path):
    assert find_parent(tmp_path, "", ("llm",)) == Parent()


def test_a_stage_finds_where_the_one_before_left_its_data(stage, tmp_path):
    (stage / "checkpoints" / "4" / "data.json").write_text('{"sources": {}}')
    assert parent_data_state(find_parent(tmp_path, str(stage), ("llm", "vision"))) == {"sources": {}}
    bare = checkpoint(epath.Path(tmp_path / "bare"), llm=0)
    for init_from in (str(bare), ""):
        with pytest.raises(ConfigError, match=r"data\.continue_sources needs the workdir of a run .*data\.json cannot"):
            parent_data_state(find_parent(tmp_path, init_from, ("llm",)))


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a checkpoint"):
        find_parent(tmp_path, str(tmp_path), ("llm",))
    (tmp_path / "parent.json").write_text("{")
    with pytest.raises(ConfigError, match=r"parent\.json cannot be read"):
        find_parent(tmp_path, "", ("llm",))


def test_the_tokenizer_comes_with_the_language_model(stage, tmp_path):
    bare = checkpoint(epath.Path(tmp_path / "bare"), vision=0)
    expected = stage / "checkpoints" / "4" / "processor" / "tokenizer.json"
    assert stored_tokenizer(stage) == expected
    assert initial_tokenizer(f"vision={bare},llm={stage}", ("llm", "vision")) == expected
    assert initial_tokenizer(f"vision={bare}", ("llm", "vision")) is None
    assert initial_tokenizer("", ("llm",)) is None
    assert stored_tokenizer(tmp_path) is None


def test_stills_are_taken_as_the_run_took_them(tmp_path):
    """By run_config.json of the workdir that the checkpoint lies in; else by the default."""
    run = RunConfig(name="x", data=DataConfig(images=ImagesConfig(orientation="released")))
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    store_run_config(epath.Path(tmp_path), run)
    assert loading._trained_images(tmp_path / "checkpoints" / "100") == run.data.images
    assert loading._trained_images(tmp_path) == loading._trained_images(None) == ImagesConfig()
