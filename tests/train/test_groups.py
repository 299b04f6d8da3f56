"""Which parameters train and how fast; what is frozen stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from baichuan_omni_jax.config import GroupConfig, OptimizerConfig, resolve_model
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import Buffer, named_variables
from baichuan_omni_jax.train.groups import Groups, assign_groups
from baichuan_omni_jax.train.optimizers import decays, make_optimizer, schedule
from baichuan_omni_jax.train.state import TASKS, init_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import compile_step
from tests.helpers.micro import micro_run, one_device, open_micro, place

VARIABLES = {
    "vision.tower.weight": nnx.Param(jnp.zeros(2)),
    "vision.tower.scale": nnx.Param(jnp.zeros(2)),
    "llm.head": nnx.Param(jnp.zeros(2)),
    "llm.statistics": Buffer(jnp.zeros(2)),
}


def group(name: str, pattern: str, rate: float | None = 1e-3) -> GroupConfig:
    return GroupConfig(name=name, pattern=pattern, learning_rate=rate)


def test_first_matching_group_wins_and_buffers_never_train():
    found = assign_groups(
        VARIABLES, (group("head", r"llm\.head"), group("still", r"vision\.", None), group("rest", ".*"))
    )
    assert found == Groups(
        trainable={"llm.head": "head"},
        frozen={"vision.tower.weight": "still", "vision.tower.scale": "still", "llm.statistics": "rest"},
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((group("a", r"vision\."),), "optimizer.groups cover no parameter called llm.head"),
        # Patterns match from the start: `head` is no name's beginning.
        ((group("a", ".*"), group("b", "head")), "optimizer group 'b' matches no parameter"),
        ((group("a", ".*", None),), "optimizer.groups freeze every parameter: nothing is left to train"),
        ((group("a", r"llm\.stat"), group("b", ".*", None)), "freeze every parameter"),
        ((group("a", "vision("), group("b", ".*")), "optimizer group 'a': pattern 'vision(' is broken: missing )"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(ConfigError) as error:
        assign_groups(VARIABLES, groups)
    assert message in str(error.value)


def test_schedule_rises_falls_and_stays():
    config = OptimizerConfig(warmup_steps=10, decay_steps=110, final_fraction=0.1)
    rate = schedule(config, group("all", ".*", 2e-3))
    # Half way down the cosine is the mean of peak and end.
    expected = {0: 0.0, 5: 1e-3, 10: 2e-3, 60: 1.1e-3, 110: 2e-4, 111: 2e-4, 10_000: 2e-4}
    assert {step: float(rate(step)) for step in expected} == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_group_may_have_a_schedule_of_its_own():
    config = OptimizerConfig(warmup_steps=10, decay_steps=110, final_fraction=0.1)
    own = dataclasses.replace(group("vision", "v", 1.0), warmup_steps=0, decay_steps=20, final_fraction=0.5)
    rate = schedule(config, own)
    assert [float(rate(step)) for step in (0, 20, 50)] == pytest.approx([1.0, 0.5, 0.5])
    with pytest.raises(ConfigError, match="group 'vision': warmup_steps 20 must be less than decay_steps 20"):
        schedule(config, dataclasses.replace(own, warmup_steps=20))


def test_moments_in_bfloat16_follow_those_in_fp32():
    """Both moments take two bytes, the structure of the state stays, and updates agree to bfloat16's rounding."""
    parameters = {"llm.head": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    labels, groups = {"llm.head": "all"}, (group("all", ".*", 1e-2),)
    wide, narrow = (
        make_optimizer(OptimizerConfig(groups=groups, warmup_steps=0, moments_dtype=dtype), labels)
        for dtype in ("float32", "bfloat16")
    )
    states, rng = [wide.init(parameters), narrow.init(parameters)], np.random.default_rng(0)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(30):
        gradients = {"llm.head": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}
        found = [one.update(gradients, state, parameters) for one, state in zip((wide, narrow), states, strict=True)]
        (exact, rounded), states = [change["llm.head"] for change, _ in found], [state for _, state in found]
        np.testing.assert_allclose(rounded, exact, atol=0.03 * np.abs(exact).max())
    moments = [leaf for leaf in jax.tree.leaves(states[1]) if leaf.shape == (8, 8)]
    assert [leaf.dtype for leaf in moments] == [jnp.bfloat16] * 2


def test_only_matrices_decay():
    assert decays("llm.layers.mlp.up_proj.weight")
    assert decays("llm.embedding")
    assert not decays("llm.norm.scale")
    assert not decays("llm.layers.attention.q_proj.bias")


def test_weight_decay_goes_by_the_task_unless_it_is_set():
    """Without a gradient a weight of 1 at rate 0.5 loses half the decay: 0.1 in language stages, nothing in audio."""
    groups = (dataclasses.replace(group("all", ".*", 0.5), warmup_steps=0, decay_steps=10),)
    decay = {name: task.weight_decay for name, task in TASKS.items()}
    assert decay == {"omni": 0.1, "audio_tokenizer": 0.0, "flow_matching": 0.0}
    for given, usual, left in ((None, 0.0, 1.0), (None, 0.1, 0.95), (0.2, 0.0, 0.9), (0.0, 0.1, 1.0)):
        optimizer = make_optimizer(OptimizerConfig(groups=groups, weight_decay=given), {"w": "all"}, usual)
        weights = {"w": jnp.ones(())}
        change, _ = optimizer.update({"w": jnp.zeros(())}, optimizer.init(weights), weights)
        assert float(weights["w"] + change["w"]) == pytest.approx(left)


@pytest.mark.slow
def test_frozen_parameters_stay_bit_for_bit(micro_root, tmp_path, quick_compile):
    """Two steps with only the audio head's level heads and embeddings trained: the rest as before, without moments."""
    run = micro_run(micro_root)
    groups = (group("audio", r"audio_head\.(embedding|head\.heads)"), group("still", ".*", None))
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, groups=groups, warmup_steps=0))
    pipeline, codes = open_micro(run, tmp_path / "codes")
    mesh, omni = one_device(), resolve_model(run.model)
    with jax.set_mesh(mesh):
        compute = make_compute(run)
        spec = make_step_spec(run, omni, mesh, compute)
        state, _ = init_state(run, spec)
        before = jax.tree.map(np.array, (state.trainable, state.frozen))
        step, steps, first = compile_step(spec), pipeline.steps(codes), state
        spoken = (each.batch for each in steps if each.batch["audio_weights"].any())
        for _ in range(2):
            batch = place(next(spoken), mesh, compute.rules)
            state, metrics = step(state, batch)
    assert metrics["loss_audio"] > 0
    assert all(np.array_equal(state.frozen[name], value) for name, value in before[1].items())
    assert not any(np.array_equal(state.trainable[name], value) for name, value in before[0].items())
    moments = {
        str(key.key)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
        for key in path
        if hasattr(key, "key")
    }
    assert set(first.trainable) <= moments
    assert not set(state.frozen) & moments
    buffers = {name for name, variable in named_variables(spec.template).items() if isinstance(variable, Buffer)}
    assert buffers
    assert buffers <= set(state.frozen)
