"""The tasks that train on audio, run as a user runs them: what moves, what stays, and exact resumption."""

import dataclasses
import functools
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from baichuan_omni_jax.audio.encoder import fingerprint
from baichuan_omni_jax.checkpoint import abstract_branches, load_branches, with_shardings
from baichuan_omni_jax.config import (
    AUDIO_RUNS,
    MACHINES,
    apply_overrides,
    load_run_config,
    resolve_model,
    tiny,
    to_hf,
)
from baichuan_omni_jax.config.machines import SIZED_MODELS
from baichuan_omni_jax.config.mel_targets import run_mel_targets
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_variables
from baichuan_omni_jax.sharding import MESH_AXES, ShardingRules, check_divisible, parameter_axes
from baichuan_omni_jax.train.input import BatchPlacer
from baichuan_omni_jax.train.state import init_state, make_compute, make_step_spec, make_task
from baichuan_omni_jax.train.step import compile_step, compute_gradients
from data_pipelines.pipeline import open_pipeline
from tests.helpers import tokenized
from tests.helpers.micro import CONFIG, REPOSITORY, Command, numbers, one_device, read_metrics, saved_arrays

TOKENIZER, FLOW = (REPOSITORY / "configs" / f"{name}_tiny.py" for name in ("audio_tokenizer", "flow_matching"))
SMALL = ("data.workers=0", "data.sample=false", "eval.every=0", "data.mel_frames=(256,)", "data.rows=1")


def small(config, root, *changes: str):
    return apply_overrides(load_run_config(config), [*SMALL, f"data.root={root}", *changes])


@functools.cache
def abstract_variables(name: str, model: str) -> dict[str, nnx.Variable]:
    """The parameters of a run, as shapes."""
    run = load_run_config(name, [f"model={model}"])
    task = make_task(run, resolve_model(model), make_compute(run))
    return named_variables(jax.eval_shape(lambda: task.make_model(jax.random.key(0))))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", AUDIO_RUNS)
def test_every_model_is_laid_out_on_every_machine(name, machine):
    """Rows, clips and parameters divide as the mesh asks; a machine may take fewer rows, and nothing else differs."""
    if (name, machine) == ("audio_tokenizer", "v6e:16x16"):
        with pytest.raises(ConfigError, match="has 256 chips, and a step 32 rows of 4 clips: fewer chips"):
            load_run_config(name, [f"machine={machine}"])
        return
    recipe = load_run_config(name)
    for model in SIZED_MODELS:
        run = load_run_config(name, [f"model={model}", f"machine={machine}"])
        mesh = AbstractMesh((1, run.mesh.fsdp, run.mesh.context, 1), MESH_AXES)
        assert mesh.size == MACHINES[machine]
        assert recipe.data.rows % run.data.rows == 0
        shards, budgets = run.mesh.context, run.data.budgets
        assert run.data.rows % (run.mesh.fsdp * run.train.accumulate) == run.train.accumulate - 1 == 0
        assert budgets.mel_windows % shards == budgets.audio_frames % shards == budgets.audio_targets % shards == 0
        assert budgets.tokens % (shards * run.data.context_block) == 0
        for path, variable in abstract_variables(name, model).items():
            check_divisible(mesh, ShardingRules(), variable.shape, parameter_axes(variable), path)
        rows = dataclasses.replace(run.data, rows=recipe.data.rows)
        same = dataclasses.replace(run, model=recipe.model, machine=recipe.machine, mesh=recipe.mesh, data=rows)
        assert same == recipe


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory) -> str:
    """The tiny model with two codebooks, as an override: levels are most of what these tests compile."""
    omni = dataclasses.replace(tiny(), audio=dataclasses.replace(tiny().audio, codebook_sizes=(64, 48)))
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(to_hf(omni)))
    return f"model={path}"


@pytest.fixture(scope="module")
def tokenizer_step(micro_root, quick_compile, two_levels):
    """(run, spec, state, batch) of the tokenizer's first step."""
    run = small(TOKENIZER, micro_root, two_levels)
    omni, mesh, compute = resolve_model(run.model), one_device(), make_compute(run)
    pipeline = open_pipeline(run.data, omni, targets=run_mel_targets(run, omni))
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        spec.task.check(mesh)
        state, _ = init_state(run, spec)
        place = BatchPlacer(1, spec.task.batch_axes(), mesh, compute.rules)
        return run, spec, state, place(next(pipeline.steps(None)).batch)


@pytest.mark.slow
def test_the_transcript_trains_the_encoder_through_a_frozen_language_model(tokenizer_step):
    """With the transcript's loss alone: gradients in encoder, bridge and adapter, none in the language model."""
    run, spec, state, batch = tokenizer_step
    settings = dataclasses.replace(
        run.tokenizer, reconstruction=0.0, commitment=0.0, commitment_start=0.0, transcript=1.0
    )
    quantizer = dataclasses.replace(settings.quantizer, quantized_share=1.0, level_dropout=0.0)
    run = dataclasses.replace(run, tokenizer=dataclasses.replace(settings, quantizer=quantizer))
    with jax.set_mesh(spec.mesh):
        spec = make_step_spec(run, spec.task.omni, spec.mesh, spec.task.compute)
        gradients, metrics, updates = jax.jit(partial(compute_gradients, spec=spec))(state, batch)
    assert metrics["loss"] == metrics["loss_transcript"] > 0
    size = lambda prefix: sum(float(jnp.abs(g).sum()) for name, g in gradients.items() if name.startswith(prefix))  # noqa: E731
    assert size("audio_encoder.encoder.") > 0
    assert size("audio_encoder.bridge.") > 0
    assert size("transcript_adapter.") > 0
    assert size("audio_decoder.") == 0
    assert not any(name.startswith("llm.") for name in gradients)
    assert {name.rsplit(".", 1)[1] for name in updates.parameters} == {"embed", "embed_avg", "cluster_size"}


@pytest.mark.slow
def test_a_clip_that_is_not_a_number_changes_nothing(tokenizer_step):
    """NaN in one mel: the step counts as not finite; parameters, codebooks and state stay bit for bit."""
    _, spec, state, batch = tokenizer_step
    mel = np.array(batch["mel"])
    mel[0, 0, 3] = np.nan
    poisoned = batch | {"mel": jax.device_put(mel, batch["mel"].sharding)}
    with jax.set_mesh(spec.mesh):
        after, numbers = compile_step(spec)(state, poisoned)
    assert numbers["nonfinite"] == 1
    assert (int(state.step), int(after.step)) == (0, 1)
    before, after = (dataclasses.replace(each, step=0) for each in (state, after))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_tokenizer_run_and_resumption(quick_pretrain, two_levels, tmp_path):
    """Six steps at once, and three and three: the same numbers and arrays, masks among them. The frozen language model
    stays, the codebooks move.
    """
    masks = "tokenizer.spec_augment.mask_time_prob=0.1"
    changes = [*SMALL, two_levels, "checkpoint.every=3", "checkpoint.keep=3", masks]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert quick_pretrain(whole, *changes, "train.steps=6", config=TOKENIZER).returncode == 0
    for steps in (3, 6):
        assert quick_pretrain(parts, *changes, f"train.steps={steps}", config=TOKENIZER).returncode == 0
    assert numbers(parts) == numbers(whole)
    ends = [saved_arrays(workdir, 6) for workdir in (whole, parts)]
    assert all(np.array_equal(ends[0][name], value) for name, value in ends[1].items())
    first = saved_arrays(whole, 3)
    still = [name for name in first if name.startswith("llm")]
    assert still
    assert all(np.array_equal(first[name], ends[0][name]) for name in still)
    assert not any(np.array_equal(first[name], ends[0][name]) for name in first if "embed_avg" in name)
    assert all(np.isfinite(row["loss"]) for row in read_metrics(whole))


@pytest.mark.slow
def test_flow_saves_the_mean_and_resumes_from_the_weights(quick_pretrain, tmp_path):
    """Two and two steps equal four; the branch holds the running mean, the optimizer's state the weights."""
    changes = [*SMALL, "checkpoint.every=2", "checkpoint.keep=3", "checkpoint.init_from="]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert quick_pretrain(whole, *changes, "train.steps=4", config=FLOW).returncode == 0
    for steps in (2, 4):
        assert quick_pretrain(parts, *changes, f"train.steps={steps}", config=FLOW).returncode == 0
    assert numbers(parts) == numbers(whole)
    ends = [saved_arrays(workdir, 4) for workdir in (whole, parts)]
    assert all(np.array_equal(ends[0][name], value) for name, value in ends[1].items())
    before = saved_arrays(whole, 2)
    frozen = [name for name in before if name.startswith("audio_")]
    assert frozen
    assert all(np.array_equal(before[name], ends[0][name]) for name in frozen)
    name = next(name for name in ends[0] if name.startswith("flow") and name.endswith("['in_fc1']['weight']"))
    kept = next(value for key, value in ends[0].items() if "mean" in key and "in_fc1" in key and "weight" in key)
    assert not np.array_equal(ends[0][name], kept)


def test_settings_that_do_not_fit_are_refused(micro_root):
    for change, message in (
        ("data.budgets.mel_windows=0", "data.budgets.mel_windows must be at least 1"),
        ("train.accumulate=2", "train.accumulate must be 1"),
        ("branches=('audio_encoder','llm')", "branches audio_encoder, llm: task audio_tokenizer has"),
        ("tokenizer.mel_scales=((100,200),)", "tokenizer.mel_scales"),
    ):
        run = small(TOKENIZER, micro_root, change)
        assert message in str(refusal(run))


def test_flow_matching_refuses_a_mel_of_another_rate_than_the_states(micro_root, tmp_path):
    omni = dataclasses.replace(tiny(), flow=dataclasses.replace(tiny().flow, hop_length=400))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(omni)))
    run = small(FLOW, micro_root, f"model={tmp_path / 'config.json'}", "checkpoint.init_from=")
    assert "make 60 mel frames a second, the audio decoder 50 states" in str(refusal(run))


def refusal(run) -> ConfigError | None:
    omni, compute, mesh = resolve_model(run.model), make_compute(run), one_device()
    with jax.set_mesh(mesh):
        try:
            make_step_spec(run, omni, mesh, compute).task.check(mesh)
        except ConfigError as error:
            return error


@pytest.mark.slow
def test_a_trained_tokenizer_makes_the_codes_of_a_language_stage(pretrain, quick_pretrain, tmp_path):
    """Its workdir as `data.audio_tokenizer`: the store is by its fingerprint, and the micro omni run trains on it."""
    workdir, root = tmp_path / "tokenizer", tmp_path / "data"
    assert quick_pretrain(workdir, *SMALL, "train.steps=2", "checkpoint.every=2", config=TOKENIZER).returncode == 0
    shutil.copytree(pretrain.root, root, ignore=shutil.ignore_patterns(".cache"))
    trained = f"data.audio_tokenizer={workdir}"
    out = tokenized.run(root, pretrain.cache, "--set", trained)
    run = apply_overrides(load_run_config(CONFIG), [trained])
    with jax.set_mesh(one_device()):
        model = make_compute(run)
        abstract = abstract_branches(resolve_model(run.model), only=["audio_encoder"], compute=model)["audio_encoder"]
        placed = with_shardings(abstract, one_device(), model.rules, name="audio_encoder")
        tokenizer = load_branches(str(workdir), {"audio_encoder": placed})["audio_encoder"]
        assert f"of tokenizer {fingerprint(tokenizer)}" in out
    written = tokenized.files_of(root)
    done = Command(root, pretrain.cache)(tmp_path / "omni", trained, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert tokenized.files_of(root) == written
    assert all(np.isfinite(row["loss_audio"]) for row in read_metrics(tmp_path / "omni") if "loss_audio" in row)
