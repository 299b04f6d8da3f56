"""The compiled step: parts of a batch add up to the whole, and what is not finite changes nothing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.config import Budgets, load_run_config, resolve_model
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.train.optimizers import schedule
from baichuan_omni_jax.train.state import init_state, make_compute, make_step_spec
from baichuan_omni_jax.train.step import StepReplay, bit_sum, compile_step, compiler_options, compute_gradients
from tests.helpers.micro import CONFIG, one_device

# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def text_run(quick_compile):
    """Micro, the language model alone: (run, spec, state, a batch of 4 rows with 2 documents each)."""
    run = load_run_config(CONFIG)
    data = dataclasses.replace(run.data, rows=4, budgets=Budgets(tokens=64, patches=0, audio_frames=0, audio_targets=0))
    run = dataclasses.replace(run, branches=("llm",), data=data, optimizer=type(run.optimizer)(warmup_steps=0))
    omni, mesh, compute = resolve_model(run.model), one_device(), make_compute(run)
    with jax.set_mesh(mesh):
        spec = make_step_spec(run, omni, mesh, compute)
        state, _ = init_state(run, spec)
        shapes = abstract_batch(4, data.budgets, omni, run.branches, mesh, compute.rules)
    rng = np.random.default_rng(0)
    first = rng.integers(1, 63, (4, 1))
    slots = np.arange(64)[None]
    values = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    values |= {name: rng.integers(0, omni.llm.vocab_size, (4, 64)) for name in ("tokens", "text_targets")}
    values["segment_ids"] = 1 + (slots >= first)
    values["positions"] = np.where(slots < first, slots, slots - first)
    values["text_weights"] = rng.uniform(0, 1, (4, 64))
    place = lambda name: jax.device_put(values[name].astype(shapes[name].dtype), shapes[name].sharding)  # noqa: E731
    return run, spec, state, {name: place(name) for name in shapes}


@pytest.mark.slow
def test_parts_add_up_to_the_whole_batch(text_run):
    """Losses and gradients in one part and in two."""
    run, spec, state, batch = text_run
    results = []
    for parts in (1, 2):
        changed = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulate=parts))
        with jax.set_mesh(spec.mesh), jax.default_matmul_precision("highest"):
            in_parts = make_step_spec(changed, spec.task.omni, spec.mesh, spec.task.compute)
            results.append(jax.jit(partial(compute_gradients, spec=in_parts))(state, batch)[:2])
    (whole, expected), (gradients, metrics) = results
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=TOLERANCE)
    for name, gradient in gradients.items():
        assert jnp.abs(gradient - whole[name]).max() <= TOLERANCE * jnp.abs(whole[name]).max(), name


def test_a_step_that_is_not_finite_changes_nothing(text_run):
    """An infinite weight makes the loss NaN: parameters and optimizer state stay bit for bit; the next step updates."""
    _, spec, state, batch = text_run
    weights = np.array(batch["text_weights"])
    weights[1, 3] = np.inf
    poisoned = batch | {"text_weights": jax.device_put(weights, batch["text_weights"].sharding)}
    with jax.set_mesh(spec.mesh):
        step = compile_step(spec)
        kept, metrics = step(state, poisoned)
        assert metrics["nonfinite"] == 1
        assert not np.isfinite(metrics["loss"])
        before, after = (jax.tree.leaves(dataclasses.replace(each, step=0)) for each in (state, kept))
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
        trained, metrics = step(kept, batch)
    assert metrics["nonfinite"] == 0
    assert not any(
        np.array_equal(value, state.trainable[name]) for name, value in trained.trainable.items() if "bias" not in name
    )
    assert (int(kept.step), int(trained.step)) == (1, 2)


def test_a_step_measures_its_groups(text_run):
    """One group: its norms are all norms, its update what the parameters differ by, its rate the schedule's."""
    run, spec, state, batch = text_run
    with jax.set_mesh(spec.mesh):
        step = compile_step(spec)
        first, metrics = step(state, batch)
        _, later = step(first, batch)
    (group,) = run.optimizer.groups
    norm = lambda values: np.sqrt(sum(np.square(np.asarray(value, np.float64)).sum() for value in values))  # noqa: E731
    moved = [first.trainable[name] - state.trainable[name] for name in state.trainable]
    assert metrics["gradient_norm/all"] == pytest.approx(float(metrics["gradient_norm"]), rel=TOLERANCE)
    assert metrics["parameter_norm/all"] == pytest.approx(norm(state.trainable.values()), rel=1e-5)
    # Differences of rounded sums.
    assert metrics["update_norm/all"] == pytest.approx(norm(moved), rel=1e-3)
    rates = [float(numbers["learning_rate/all"]) for numbers in (metrics, later)]
    assert rates == [pytest.approx(float(schedule(run.optimizer, group)(count)), rel=1e-6) for count in (0, 1)]


def test_a_replayed_step_has_the_same_bits_unless_one_is_flipped(text_run):
    _, spec, state, batch = text_run
    with jax.set_mesh(spec.mesh):
        replay = StepReplay(spec)
        assert replay(state, batch) == []
        compute, calls = replay._gradients, []

        def flipped(state, batch):
            """The second time one bit of one gradient is another."""
            found = compute(state, batch)
            calls.append(1)
            if len(calls) == 2:
                name = "llm.norm.scale"
                bits = np.array(found.by_name[name]).view(np.uint32)
                bits[3] ^= 1 << 20
                found.by_name[name] = jax.device_put(bits.view(np.float32), found.by_name[name].sharding)
            return found

        replay._gradients = flipped
        differing = replay(state, batch)
    # Adam's first update goes by the gradient's sign: the moments have the flipped bit, the parameter need not.
    assert any("mu llm.norm.scale" in name for name in differing), differing


def test_any_flipped_bit_changes_the_sum_of_bits():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32):
        value = np.ones(5, dtype)
        before = int(bit_sum(jnp.asarray(value)))
        raw = value.view(np.uint8)
        for place in range(8 * raw.size):
            raw[place // 8] ^= 1 << place % 8
            assert int(bit_sum(jnp.asarray(value))) != before
            raw[place // 8] ^= 1 << place % 8


def test_gradients_of_int8_products_are_rounded_by_the_step(text_run):
    """The same bits from the same step, as a resumed run takes it; others from the next, and all near those of fp32."""
    run, spec, state, batch = text_run
    changed = dataclasses.replace(run.compute, quantize="int8", mlp_chunk=16)
    run = dataclasses.replace(run, compute=changed)
    with jax.set_mesh(spec.mesh):
        int8 = make_step_spec(run, spec.task.omni, spec.mesh, make_compute(run))
        gradients = jax.jit(partial(compute_gradients, spec=int8))
        near = jax.jit(partial(compute_gradients, spec=spec))(state, batch)
        first, metrics, _ = gradients(state, batch)
        copy = jax.tree.map(lambda value: jnp.array(np.asarray(value), device=value.sharding), state)
        again, _, _ = gradients(copy, batch)
        later, same, _ = gradients(dataclasses.replace(state, step=state.step + 1), batch)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    # No value is rounded by chance: losses of the same weights are the same.
    assert metrics["loss"] == same["loss"] != near.metrics["loss"]
    assert float(metrics["loss"]) == pytest.approx(float(near.metrics["loss"]), rel=0.01)
    matrices = [name for name in first if "_proj.weight" in name]
    assert not any(np.array_equal(first[name], later[name]) for name in matrices if "layers.mlp" in name)
    for name in matrices:
        off = jnp.sqrt(((first[name] - near.by_name[name]) ** 2).mean() / (near.by_name[name] ** 2).mean())
        assert off < 0.1, (name, float(off))


def test_int8_products_are_refused_where_no_language_model_trains(text_run):
    run, *_ = text_run
    run = dataclasses.replace(run, task="flow_matching", compute=dataclasses.replace(run.compute, quantize="int8"))
    with pytest.raises(ConfigError, match=r"compute.quantize 'int8' is for the task 'omni' alone, not 'flow_matching'"):
        make_compute(run)


def test_a_chip_with_sparse_cores_gets_its_options_and_the_runs_own_come_last():
    flag = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
    assert compiler_options("cpu") == {}
    assert compiler_options("TPU v5 lite") == {}
    for kind in ("TPU v5", "TPU v6 lite"):
        options = compiler_options(kind)
        assert options[flag] == "true"
        # libtpu refuses these there as wrong: they must not come in by the table.
        assert not any("async_collective_fusion" in name for name in options)
        assert compiler_options(kind, [f"{flag}=false"]) == {**options, flag: "false"}


@pytest.mark.parametrize("text", ["", "xla_flag", "xla_flag=", "=true"])
def test_a_compiler_option_is_a_name_and_a_value(text):
    with pytest.raises(ConfigError, match=r"compute\.compiler_options: .* is not of the form NAME=VALUE"):
        compiler_options("cpu", [text])
