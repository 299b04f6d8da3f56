"""A workdir remembers the checkpoints it started from, and a run finds the tokenizers of its weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from baichuan_omni_jax.checkpoint import (
    Parent,
    TokenizerOrigin,
    Workdir,
    abstract_branches,
    find_checkpoint,
    find_parent,
    find_tokenizer,
    initial_tokenizer,
    keep_tokenizer,
    kept_steps,
    load_branches,
    parent_data_state,
    record_parent,
    save_branches,
    stored_tokenizer,
    with_text_tokenizer,
)
from baichuan_omni_jax.checkpoint.checksums import write_checksums
from baichuan_omni_jax.checkpoint.provenance import note_start, store_run_config
from baichuan_omni_jax.checkpoint.steps import committed_steps, newest_good, remove_unfinished_steps
from baichuan_omni_jax.config import CheckpointConfig, DataConfig, ImagesConfig, RunConfig, tiny
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.generation import loading
from baichuan_omni_jax.generation.loading import load_for_generation
from baichuan_omni_jax.nn.param import named_values


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
    # A run without a language model (flow matching): its model's ids are of that tokenizer all the same.
    assert initial_tokenizer(f"audio_encoder={stage},flow=random", ("flow", "audio_encoder")) == expected

    run = RunConfig(name="next", checkpoint=CheckpointConfig(init_from=str(stage)))
    own = checkpoint(epath.Path(tmp_path / "next"), llm=1)
    assert with_text_tokenizer(run).data.tokenizer == str(expected)
    assert with_text_tokenizer(run, own).data.tokenizer == str(own / "processor" / "tokenizer.json")
    named = replace(run, data=DataConfig(tokenizer="t.json"))
    assert with_text_tokenizer(named, own) == named
    assert with_text_tokenizer(RunConfig(name="first")).data.tokenizer == ""
    assert stored_tokenizer(tmp_path) is None


def test_stills_are_taken_as_the_run_took_them(tmp_path):
    """By run_config.json of the workdir that the checkpoint lies in; else by the default."""
    run = RunConfig(name="x", data=DataConfig(images=ImagesConfig(orientation="released")))
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    store_run_config(epath.Path(tmp_path), run)
    assert loading._trained_images(tmp_path / "checkpoints" / "100") == run.data.images
    assert loading._trained_images(tmp_path) == loading._trained_images(None) == ImagesConfig()


def zeros(name: str):
    """A branch of the tiny model, all of it zero: nothing is drawn or compiled."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_branches(tiny(), only=[name])[name])


@pytest.fixture(scope="module")
def audio_run(tmp_path_factory) -> epath.Path:
    """A run's workdir: one step of a language model and an audio head, and the seeded tokenizer of its codes."""
    workdir = epath.Path(tmp_path_factory.mktemp("audio") / "run")
    branches = {name: zeros(name) for name in ("llm", "audio_head")}
    save_branches(workdir / "checkpoints" / "3", branches, tiny(), trained=dict.fromkeys(branches, 3))
    tokenizer = jax.tree.map(lambda x: x + 1, zeros("audio_encoder"))
    keep_tokenizer(workdir, tokenizer, tiny(), TokenizerOrigin("", untrained=True))
    return workdir


def copy(workdir: epath.Path, folder: Path) -> epath.Path:
    return epath.Path(shutil.copytree(workdir, folder / "copy"))


@pytest.mark.parametrize("moved", [False, True])
def test_a_workdir_brings_the_tokenizer_of_its_codes(audio_run, moved, tmp_path):
    """To whoever generates and to the next stage, whole or by branch, also where the workdir was copied to."""
    workdir = copy(audio_run, tmp_path) if moved else audio_run
    loaded = load_for_generation(str(workdir))
    assert set(loaded.branches) == {"llm", "audio_head", "audio_encoder"}
    assert loaded.untrained == ("audio_encoder",)
    assert all((np.asarray(x) == 1).all() for x in named_values(loaded.branches["audio_encoder"]).values())
    abstract = {"audio_encoder": abstract_branches(tiny(), only=["audio_encoder"])["audio_encoder"]}
    assert load_branches(f"audio_encoder={workdir}", abstract).keys() == abstract.keys()
    step, kept = workdir / "checkpoints" / "3", workdir / "audio_tokenizer"
    parent = find_parent(tmp_path, f"llm={workdir},audio_encoder={workdir}", ("llm", "audio_encoder"))
    assert parent.checkpoints == {"llm": str(step), "audio_encoder": str(kept)}
    assert parent.trained == {"llm": 3, "audio_encoder": 0}


def test_a_run_takes_its_own_tokenizer_then_the_named_one_then_that_of_its_first_weights(audio_run, tmp_path):
    plain = epath.Path(tmp_path / "tokenizer")
    save_branches(plain, {"audio_encoder": zeros("audio_encoder")}, tiny(), trained={"audio_encoder": 7})
    kept = audio_run / "audio_tokenizer"

    def found(named="", init_from="", workdir=None):
        run = RunConfig(
            name="next", data=DataConfig(audio_tokenizer=named), checkpoint=CheckpointConfig(init_from=init_from)
        )
        return find_tokenizer(run, workdir)

    assert found() is None  # the seeded one
    assert found(workdir=tmp_path) is None
    assert found(init_from=str(audio_run)) == kept
    assert found(init_from=f"llm={audio_run},vision=random,audio_head=random") is None  # its codes are new
    assert found(named=str(plain), init_from=str(audio_run)) == plain
    assert found(named=str(audio_run)) == kept
    assert found(named=str(plain), workdir=audio_run) == kept
    bare = epath.Path(tmp_path / "bare")
    save_branches(bare, {"llm": zeros("llm")}, tiny())
    with pytest.raises(ConfigError, match=r"data.audio_tokenizer .*bare has no branch audio_encoder"):
        found(named=str(bare))
    # A stage that goes on with a trained one keeps its steps.
    keep_tokenizer(tmp_path / "stage", zeros("audio_encoder"), tiny(), TokenizerOrigin(str(plain), untrained=False))
    info = json.loads((tmp_path / "stage" / "audio_tokenizer" / "branches.json").read_text())
    assert info["audio_encoder"]["trained"] == 7


def test_a_damaged_or_half_written_tokenizer_is_not_taken_for_a_good_one(audio_run, tmp_path):
    workdir = copy(audio_run, tmp_path)
    half = workdir / "audio_tokenizer.orbax-checkpoint-tmp-0"
    (half / "params").mkdir(parents=True)
    run = RunConfig(name="run")
    Workdir(workdir, keep=1).write_run_config(run)
    assert not half.exists()
    assert find_checkpoint(workdir / "audio_tokenizer").name == "audio_tokenizer"
    (workdir / "audio_tokenizer" / "origin.json").write_text("{}")
    for use in (lambda: find_tokenizer(run, workdir), lambda: load_for_generation(str(workdir))):
        with pytest.raises(ConfigError, match=r"audio_tokenizer is damaged: origin.json is missing or changed"):
            use()


def test_a_tokenizer_that_cannot_be_written_ends_the_run_with_one_sentence(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("baichuan_omni_jax.checkpoint.provenance.save_branches", full)
    with pytest.raises(RunStoppedError, match=r"saving the audio tokenizer in .* failed: No space left on device"):
        keep_tokenizer(tmp_path, {}, tiny(), TokenizerOrigin("", untrained=True))


@pytest.mark.parametrize("text", ['{"last": ""}', "[8]", "{"])
def test_a_list_of_kept_steps_that_somebody_spoiled_is_named(tmp_path, text):
    """It is edited by hand, to let a step go."""
    (tmp_path / "kept_steps.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/kept_steps.json"):
        kept_steps(epath.Path(tmp_path))


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", ["", "null", "[1]", '"x"', "{}", DEEP, '{"run": 5, "starts": []}'])
def test_a_record_of_starts_that_somebody_spoiled_is_begun_anew(tmp_path, text):
    (tmp_path / "starts.json").write_text(text)
    assert note_start(epath.Path(tmp_path), 8, {}) == ""
    assert [start["step"] for start in json.loads((tmp_path / "starts.json").read_text())["starts"]] == [8]


@pytest.mark.parametrize(
    "text", ["", "null", "[1]", DEEP, '{"trained": {"llm": "x"}}', '{"trained": []}', '{"new": 1}']
)
def test_a_spoiled_parent_is_named(tmp_path, text):
    (tmp_path / "parent.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/parent.json "):
        find_parent(tmp_path, "", ("llm",))


@pytest.mark.parametrize(
    "text", ["", "null", "[1]", '"x"', "3", "{}", DEEP, '{"a\\u0000b": 1}', '{"../x": 1}', '{"a": []}']
)
def test_spoiled_checksums_are_a_damaged_step(tmp_path, text):
    for step, sums in ((2, text), (1, "")):
        folder = tmp_path / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "data.json").write_text("{}")
        (folder / "checksums.json").write_text(sums) if sums or step == 2 else write_checksums(folder)
    assert newest_good(epath.Path(tmp_path), [1, 2])[0] == 1


def test_folders_that_are_no_steps_of_a_run_are_left_alone(tmp_path):
    """Copies and the like: none is taken for a step, or for what a killed run left."""
    for name in ("8", "08", "\u0668", "9" * 30, "-1", "\u00b2", "8 copy"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "checksums.json").write_text("{}")
    assert committed_steps(epath.Path(tmp_path)) == [8]
    assert not remove_unfinished_steps(epath.Path(tmp_path))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 7
