"""The recipe's stages: what trains in each, and a chain of all six."""

import functools
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from baichuan_omni_jax.checkpoint import find_parent, load_branches, with_shardings
from baichuan_omni_jax.config import MACHINES, MODELS, STAGES, RunConfig, load_run_config, resolve_model, stage_groups
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, named_variables
from baichuan_omni_jax.omni.model import OmniModel
from baichuan_omni_jax.sharding import MESH_AXES, ShardingRules, check_divisible, parameter_axes
from baichuan_omni_jax.train.groups import assign_groups, special_ids
from baichuan_omni_jax.train.state import branches_of
from tests.helpers.micro import REPOSITORY, environment, one_device, small_copy

# What trains in each stage of the report, by the longest common beginning of its names.
PARTS = ("vision.projector.", "vision.tower.", "llm.", "audio_head.")
TRAINABLE = {
    "image_text_1": {"vision.projector."},
    "image_text_2": {"vision.projector.", "vision.tower.", "llm."},
    "image_audio_text_1": {"audio_head."},
    "image_audio_text_2": {"vision.projector.", "llm.", "audio_head."},
    "omni_64k": {"vision.projector.", "llm.", "audio_head."},
    "sft": {"vision.projector.", "llm.", "audio_head."},
}


NAMED = [name for name in MODELS if name not in ("tiny", "small")]


def config(stage: str, suffix: str = "") -> RunConfig:
    return load_run_config(REPOSITORY / "configs" / f"{stage}{suffix}.py")


@functools.cache
def abstract_model(name: str) -> OmniModel:
    return jax.eval_shape(lambda: OmniModel(jax.random.key(0), resolve_model(name), ComputePolicy()))


@pytest.mark.parametrize("suffix", ["", "_tiny"])
def test_stages_train_what_the_recipe_says(suffix):
    variables = named_variables(abstract_model(config("sft", suffix).model))
    assert set(TRAINABLE) == set(STAGES)
    for stage in STAGES:
        groups = assign_groups(variables, config(stage, suffix).optimizer.groups)
        whole = set(groups.trainable) - set(groups.rows.values())
        assert {part for part in PARTS for name in whole if name.startswith(part)} == TRAINABLE[stage]
        # Where nothing of the language model trains, the rows of special tokens do.
        assert set(groups.rows) == (set() if "llm." in TRAINABLE[stage] else {"llm.embedding", "llm.head"})


def test_weights_that_know_the_special_tokens_need_no_rows():
    variables = named_variables(abstract_model("tiny"))
    for stage in ("image_text_1", "image_audio_text_1"):
        groups = assign_groups(variables, config(stage, "_tiny").optimizer.groups, special_token_rows=False)
        assert not groups.rows
        assert not any(name.startswith("llm.") for name in groups.trainable)


def test_text_ends_can_stay_frozen():
    variables = named_variables(abstract_model("tiny"))
    groups = assign_groups(variables, stage_groups("image_audio_text_2", freeze_text_ends=True))
    assert {name for name in groups.frozen if name.startswith("llm.")} == {"llm.embedding", "llm.head"}
    assert groups.rows == {"llm.embedding": "llm.embedding_rows", "llm.head": "llm.head_rows"}
    with pytest.raises(ConfigError, match="image_text_1' freezes the whole language model: freeze_text_ends adds"):
        stage_groups("image_text_1", freeze_text_ends=True)


def test_layers_of_the_language_model_are_all_but_its_text_ends():
    for stage in STAGES:
        ends = "llm." in TRAINABLE[stage]
        assert stage_groups(stage, language="layers") == stage_groups(stage, freeze_text_ends=ends)


def test_unknown_stage():
    with pytest.raises(ConfigError, match="stage 'rlhf' is not one of image_text_1, "):
        stage_groups("rlhf")


def test_other_slices_train_the_same_stage():
    """The mesh and the accumulation differ, the rows of an update do not."""
    whole = config("omni_64k")
    for machine, fsdp, context in (("v5p:2x2x2", 2, 4), ("v6e:4x8", 4, 8)):
        run = load_run_config("omni_64k", [f"machine={machine}"])
        assert (run.data, run.optimizer, run.train.steps) == (whole.data, whole.optimizer, whole.train.steps)
        assert (run.mesh.fsdp, run.mesh.context) == (fsdp, context)
        assert run.data.rows == run.mesh.fsdp * run.train.accumulate


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("model", NAMED)
def test_every_stage_of_every_model_is_laid_out_on_every_machine(model, machine):
    """A stage reads as many tokens everywhere; rows, patches and parameters divide as the mesh asks."""
    if (model, machine) == ("omni_0b5", "v6e:16x16"):
        pytest.skip("896 numbers of a token are not split over 256 chips, and need not be")
    variables = named_variables(abstract_model(model))
    for stage in STAGES:
        run = load_run_config(stage, [f"model={model}", f"machine={machine}"])
        mesh, data = run.mesh, run.data
        assert mesh.fsdp * mesh.context == MACHINES[machine]
        update = data.rows * data.budgets.tokens
        assert update == (2**21 if machine == "v6e:16x16" else 2**20)
        released = load_run_config(stage)
        assert run.train.steps * update == released.train.steps * 2**20
        assert run.optimizer.warmup_steps * update == released.optimizer.warmup_steps * 2**20
        assert data.rows % (mesh.fsdp * run.train.accumulate) == 0
        abstract = AbstractMesh((1, mesh.fsdp, mesh.context, 1), MESH_AXES)
        assert data.media_shards % mesh.context == data.budgets.patches % (4 * data.media_shards) == 0
        assert data.budgets.tokens % (mesh.context * data.context_block) == 0
        assert data.budgets.audio_frames % mesh.context == data.budgets.audio_targets % mesh.context == 0
        for name, variable in variables.items():
            check_divisible(abstract, ShardingRules(), variable.shape, parameter_axes(variable), name)
        # The same branches train as in the recipe, the language model in part where the machine is small.
        groups = assign_groups(variables, run.optimizer.groups)
        whole = set(groups.trainable) - set(groups.rows.values())
        assert {part for part in PARTS for name in whole if name.startswith(part)} == TRAINABLE[stage]


@pytest.mark.parametrize("name", [*STAGES, "audio_tokenizer", "flow_matching"])
def test_all_files_of_a_run_lie_in_one_home(name):
    here, there = load_run_config(name), load_run_config(name, ["home=gs://bucket/omni/"])
    assert there.data.root == f"gs://bucket/omni/{here.data.root}"
    # Several branches from several places: `branch=PATH,branch=PATH`.
    for own, moved in zip(here.checkpoint.init_from.split(","), there.checkpoint.init_from.split(","), strict=True):
        branch, _, path = own.rpartition("=")
        assert moved == (own if path == "random" else f"{branch}{'=' * bool(branch)}gs://bucket/omni/{path}")
    if here.data.audio_tokenizer:
        assert there.data.audio_tokenizer == f"gs://bucket/omni/{here.data.audio_tokenizer}"
    with pytest.raises(ConfigError, match="sft_tiny has no home: set data"):
        load_run_config("sft_tiny", ["home=gs://bucket"])


def test_a_machine_too_small_trains_the_attention_of_the_language_model():
    run = load_run_config("sft", ["model=baichuan_omni_7b", "machine=h100:1"])
    groups = assign_groups(named_variables(abstract_model(run.model)), run.optimizer.groups)
    language = {name for name in groups.trainable if name.startswith("llm.")}
    attention = {name for name in language if name.startswith("llm.layers.attention.")}
    # And the rows of the special tokens, as in all stages that freeze the tables.
    assert language - attention == set(groups.rows.values())
    assert len(attention) == 7
    # Where the stage leaves the language model alone, so does the machine.
    first = load_run_config("image_text_1", ["model=baichuan_omni_7b", "machine=h100:1"])
    assert first.optimizer.groups == config("image_text_1").optimizer.groups


def test_kv_heads_that_tensor_does_not_divide_are_refused_by_name():
    variables = named_variables(abstract_model("omni_0b5"))
    name, mesh = "llm.layers.attention.k_proj.weight", AbstractMesh((1, 1, 1, 4), MESH_AXES)
    with pytest.raises(ConfigError, match=rf"{name}: dimension kv_heads of 2 is not divisible by 4, the mesh axes ten"):
        check_divisible(mesh, ShardingRules(), variables[name].shape, parameter_axes(variables[name]), name)


@pytest.mark.slow
def test_chain_of_all_stages(sample_dir, tmp_path):
    """Each stage starts from the one before; what it freezes ends bit-equal to its parent's, the rest has moved.

    Of the tables in which only special tokens train, all other rows are bit-equal.
    """
    root, chain = small_copy(sample_dir, tmp_path / "data"), tmp_path / "chain"
    command = [sys.executable, str(REPOSITORY / "launch" / "run_stages.py"), "--workdir", str(chain), "--tiny"]
    changes = (f"data.root={root}", "data.sample=false", "train.steps=3")
    command += [part for change in changes for part in ("--set", change)]
    env = environment(tmp_path / "xla", quick=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    variables = named_variables(abstract_model("tiny"))
    for earlier, stage in pairwise(STAGES):
        parent, workdir = chain / f"{earlier}_tiny", chain / f"{stage}_tiny"
        recorded = find_parent(workdir, "", ())
        assert set(recorded.checkpoints.values()) == {str(parent / "checkpoints" / "3")}
        assert set(recorded.runs.values()) == {parent.name}
        before, after = read(parent), read(workdir)
        groups = assign_groups(variables, config(stage, "_tiny").optimizer.groups)
        moved = {name for name in after if not np.array_equal(before[name], after[name])}
        assert moved <= set(groups.trainable) | set(groups.rows)
        assert len(moved) > 0.9 * len(groups.trainable)
        for table in groups.rows:
            changed = np.flatnonzero((before[table] != after[table]).any(1))
            assert set(changed) <= set(special_ids(config(stage, "_tiny"), resolve_model("tiny")))
            assert len(changed) or table == "llm.embedding"


def read(workdir: Path) -> dict[str, np.ndarray]:
    mesh = one_device()
    with jax.set_mesh(mesh):
        branches = branches_of(with_shardings(abstract_model("tiny"), mesh, ShardingRules()))
        return jax.tree.map(np.asarray, named_values(load_branches(str(workdir), branches)))
