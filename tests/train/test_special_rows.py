"""Rows of special tokens that train in frozen tables, and frozen parameters that no stage rounds on their way."""

import dataclasses
import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from baichuan_omni_jax.checkpoint import Workdir, load_branches, read_branch_info, save_branches
from baichuan_omni_jax.config import Budgets, GroupConfig, load_run_config, resolve_model
from baichuan_omni_jax.config.stages import TEXT_ENDS
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_values, named_variables
from baichuan_omni_jax.omni.batch import abstract_batch
from baichuan_omni_jax.train.groups import assign_groups, special_ids, untrained_targets
from baichuan_omni_jax.train.preflight.report import group_sizes
from baichuan_omni_jax.train.run import groups_table
from baichuan_omni_jax.train.state import (
    abstract_state,
    branches_of,
    from_checkpoint,
    init_state,
    make_compute,
    make_step_spec,
    make_task,
    saved_opt_state,
    to_checkpoint,
)
from baichuan_omni_jax.train.step import compile_step, compute_gradients
from tests.helpers.micro import CONFIG, one_device

# Of max|difference| / max|reference| per tensor, fp32.
TOLERANCE = 1e-5
TOKENS = 64
# OmniConfig.tokens of `tiny` without the end of text, in the order of its fields.
MARKS = (33, 34, 35, 36, 37, 38, 51, 52, 53, 57, 58)
AUDIOGEN_START = 57
ROWS = GroupConfig(name="marks", pattern=TEXT_ENDS, learning_rate=1e-2, special_tokens_only=True)
FROZEN = GroupConfig(name="frozen", pattern=".*", learning_rate=None)
ALL = GroupConfig(name="all", pattern=".*", learning_rate=1e-3)


def run_of(*groups: GroupConfig, **train):
    """Micro, the language model alone, with these groups."""
    run = load_run_config(CONFIG)
    budgets = Budgets(tokens=TOKENS, patches=0, audio_frames=0, audio_targets=0)
    return dataclasses.replace(
        run,
        branches=("llm",),
        data=dataclasses.replace(run.data, rows=2, budgets=budgets),
        optimizer=dataclasses.replace(run.optimizer, groups=groups, warmup_steps=0),
        train=dataclasses.replace(run.train, **train),
    )


OMNI = resolve_model(run_of(ALL).model)


def started(run):
    """(spec, state at step 0, originals) on one device, whose mesh is the current one."""
    spec = make_step_spec(run, OMNI, one_device(), make_compute(run))
    return spec, *init_state(run, spec)


@pytest.fixture(scope="module", autouse=True)
def mesh(quick_compile):
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def batch(mesh):
    """Random text in which every fourth token is a special one."""
    run, rng = run_of(ALL), np.random.default_rng(0)
    shapes = abstract_batch(2, run.data.budgets, OMNI, run.branches, one_device(), make_compute(run).rules)
    tokens = rng.integers(0, OMNI.llm.vocab_size, (2, TOKENS + 1))
    tokens[:, ::4] = rng.choice(MARKS, tokens[:, ::4].shape)
    values = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    values |= {"tokens": tokens[:, :-1], "text_targets": tokens[:, 1:], "segment_ids": np.ones((2, TOKENS))}
    values |= {"positions": np.tile(np.arange(TOKENS), (2, 1)), "text_weights": rng.uniform(0, 1, (2, TOKENS))}
    return {name: jax.device_put(values[name].astype(shape.dtype), shape.sharding) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def rounding(mesh):
    """A run that trains the rows alone and computes from bf16: (run, spec, its step)."""
    run = run_of(ROWS, FROZEN, frozen_dtype="bfloat16")
    spec, _, _ = started(run)
    return run, spec, compile_step(spec)


def relative(value, reference) -> float:
    value, reference = np.asarray(value), np.asarray(reference)
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def saved_tables(spec, state, originals) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, named_values(to_checkpoint(spec, state, originals)[0]))


def test_rows_learn_as_they_would_in_a_table_that_trains(batch):
    """Loss and gradient of the rows against those of the whole model, all of it trainable."""
    whole_run, run = run_of(ALL), run_of(ROWS, FROZEN)
    whole_spec, whole, _ = started(whole_run)
    spec, state, _ = started(run)
    expected, metrics, _ = jax.jit(partial(compute_gradients, spec=whole_spec))(whole, batch)
    found, own, _ = jax.jit(partial(compute_gradients, spec=spec))(state, batch)
    assert float(own["loss"]) == pytest.approx(float(metrics["loss"]), rel=TOLERANCE)
    assert set(found) == {"llm.embedding_rows", "llm.head_rows"}
    for table in ("llm.embedding", "llm.head"):
        assert relative(found[f"{table}_rows"], np.asarray(expected[table])[list(MARKS)]) <= TOLERANCE, table


def test_only_the_rows_train_and_have_a_state(rounding, batch):
    """Two steps: of the saved model nothing but the rows of marks changed, bit for bit."""
    run, spec, step = rounding
    state, originals = init_state(run, spec)
    before = saved_tables(spec, state, originals)
    for _ in range(2):
        state, _ = step(state, batch)
    rows = (len(MARKS), OMNI.llm.hidden_size)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert shapes == {(), rows}
    after = saved_tables(spec, state, originals)
    assert set(after) == set(before)
    for name, value in after.items():
        if name not in ("llm.embedding", "llm.head"):
            assert np.array_equal(value, before[name]), name
            continue
        assert value.dtype == np.float32
        changed = np.flatnonzero((value != before[name]).any(1))
        # Marks that no token is have no gradient in the embedding, and no weight decay moves them.
        seen = set(np.unique(np.asarray(batch["tokens"]))) if name == "llm.embedding" else set(MARKS)
        assert set(changed) == set(MARKS) & seen, name


def test_a_resumed_run_goes_on_exactly(rounding, batch, tmp_path):
    """A step from files against the same step without the stop; the files hold whole tables."""
    run, spec, step = rounding
    state, originals = init_state(run, spec)
    first, _ = step(state, batch)
    workdir = Workdir(tmp_path, keep=1)
    branches, opt_state = to_checkpoint(spec, first, originals)
    workdir.save(1, branches, opt_state, {}, OMNI)
    workdir.wait()
    found = workdir.restore(None, branches_of(spec.stored), saved_opt_state(abstract_state(spec)))
    workdir.close()
    resumed, again = from_checkpoint(spec, found.branches, found.opt_state, found.step)
    assert set(again) == set(originals)
    goes_on = [step(each, batch) for each in (first, resumed)]
    for a, b in zip(*map(jax.tree.leaves, goes_on), strict=True):
        assert np.array_equal(a, b)
    assert found.branches["llm"].embedding.shape == (OMNI.llm.vocab_size, OMNI.llm.hidden_size)


def test_a_frozen_branch_comes_through_a_stage_unrounded(rounding, batch, tmp_path):
    """A stage that computes from bf16 starts from fp32 weights; the next stage trains them from exactly these."""
    run, spec, step = rounding
    parent, _ = init_state(run_of(ALL, seed=5), make_step_spec(run_of(ALL), OMNI, one_device(), make_compute(run)))
    original = jax.tree.map(np.asarray, parent.trainable)
    model = spec.assemble(parent.trainable | {name: None for name in spec.groups.rows.values()}, {})
    save_branches(tmp_path / "parent", branches_of(model), OMNI)

    from_parent = dataclasses.replace(run.checkpoint, init_from=str(tmp_path / "parent"))
    state, originals = init_state(dataclasses.replace(run, checkpoint=from_parent), spec)
    assert {str(value.dtype) for value in state.frozen.values()} == {"bfloat16"}
    assert {value.sharding.memory_kind for value in originals.values()} == {"pinned_host"}
    state, _ = step(state, batch)
    workdir = Workdir(tmp_path / "stage", keep=1)
    workdir.save(1, *to_checkpoint(spec, state, originals), {}, OMNI)
    workdir.close()

    # The next stage, and one after it that freezes again.
    for groups in ((ALL,), (ROWS, FROZEN)):
        following = run_of(*groups, frozen_dtype="bfloat16")
        following = dataclasses.replace(
            following, checkpoint=dataclasses.replace(following.checkpoint, init_from=str(tmp_path / "stage"))
        )
        values = saved_tables(*started(following))
        for name, value in values.items():
            kept = np.delete(np.arange(len(value)), MARKS) if name in spec.groups.rows else slice(None)
            assert np.array_equal(value[kept], original[name][kept]), name


@pytest.mark.slow
def test_weights_that_bf16_holds_are_kept_as_bf16(rounding, tmp_path):
    """Of a bf16 checkpoint nothing is lost, so nothing is kept beside it; tables with trained rows become fp32."""
    run, spec, _ = rounding
    narrow = {name: jnp.zeros(shape.shape, jnp.bfloat16) + 0.75 for name, shape in named_values(spec.stored).items()}
    model = spec.assemble(narrow | {name: None for name in spec.groups.rows.values()}, {})
    save_branches(tmp_path / "parent", branches_of(model), OMNI)
    from_parent = dataclasses.replace(run.checkpoint, init_from=str(tmp_path / "parent"))
    state, originals = init_state(dataclasses.replace(run, checkpoint=from_parent), spec)
    assert not originals
    branches, _ = to_checkpoint(spec, state, originals)
    save_branches(tmp_path / "saved", branches, OMNI)
    assert read_branch_info(tmp_path / "saved")["llm"].dtype == "bfloat16+float32"
    assert branches["llm"].layers.mlp.up_proj.weight.dtype == jnp.bfloat16
    loaded = load_branches(str(tmp_path / "saved"), branches_of(spec.stored))
    assert all((value == 0.75).all() for value in named_values(loaded).values())


@pytest.mark.parametrize("rows", [True, False])
def test_marks_are_targets_only_where_their_row_of_the_head_trains(batch, rows):
    """Without it the text weights, which losses, denominators and counts go by, are 0 at these targets."""
    norm = GroupConfig(name="norm", pattern=r"llm\.norm\.", learning_rate=1e-3)
    run = run_of(ROWS, norm, FROZEN, special_token_rows=rows)
    assert untrained_targets(run, OMNI) == (() if rows else MARKS)
    spec = make_step_spec(run, OMNI, one_device(), make_compute(run))
    weights = np.asarray(batch["text_weights"])
    masked = np.isin(np.asarray(batch["text_targets"]), MARKS)
    assert (np.asarray(batch["text_targets"]) == AUDIOGEN_START).any()
    expected = weights if rows else np.where(masked, 0, weights)
    np.testing.assert_array_equal(
        np.asarray(spec.task.mask_untrained_targets(batch)["text_weights"]), expected.astype(np.float32)
    )
    assert float(spec.task.batch_counts(batch)["text_targets"]) == np.count_nonzero(expected)


@pytest.mark.parametrize(("rate", "ids"), [(None, MARKS), (1e-3, ())])
def test_a_frozen_language_model_has_no_marks_as_targets_of_transcripts(batch, rate, ids):
    """The audio tokenizer's text loss goes through a head that is frozen as well: it would shape the features."""
    config = load_run_config(CONFIG.with_name("audio_tokenizer_tiny.py"))
    language_model = dataclasses.replace(config.optimizer.groups[0], learning_rate=rate)
    optimizer = dataclasses.replace(config.optimizer, groups=(language_model, *config.optimizer.groups[1:]))
    run = dataclasses.replace(config, optimizer=optimizer)
    weights, masked = np.asarray(batch["text_weights"]), np.isin(np.asarray(batch["text_targets"]), ids)
    task = make_task(run, OMNI, make_compute(run))
    np.testing.assert_array_equal(
        np.asarray(task.mask_untrained_targets(batch)["text_weights"]), np.where(masked, 0, weights)
    )
    deaf = dataclasses.replace(run, branches=("audio_encoder", "audio_decoder"))
    assert make_task(deaf, OMNI, make_compute(deaf)).mask_untrained_targets(batch) is batch


@pytest.mark.slow
def test_text_loss_of_marks_alone_moves_nothing_before_a_frozen_head(batch):
    """What trains is before the head: a batch whose only targets are marks gives it no gradient at all."""
    norm = GroupConfig(name="norm", pattern=r"llm\.norm\.", learning_rate=1e-3)
    run = run_of(ROWS, norm, FROZEN, special_token_rows=False)
    spec, state, _ = started(run)
    marks = jnp.full_like(batch["text_targets"], AUDIOGEN_START)
    gradients, metrics, _ = jax.jit(partial(compute_gradients, spec=spec))(state, batch | {"text_targets": marks})
    assert metrics["loss"] == 0
    assert not gradients["llm.norm.scale"].any()


@pytest.mark.parametrize(("rows", "rate"), [(True, "0.01"), (False, "frozen")])
def test_a_group_of_which_nothing_trains_is_shown_as_frozen(rows, rate):
    norm = GroupConfig(name="norm", pattern=r"llm\.norm\.", learning_rate=1e-3)
    run = run_of(ROWS, norm, FROZEN, special_token_rows=rows)
    spec = make_step_spec(run, OMNI, one_device(), make_compute(run))
    console = Console(record=True, width=120, quiet=False, file=io.StringIO())
    console.print(groups_table(run, spec))
    line = next(line for line in console.export_text().splitlines() if " marks " in line)
    size = 2 * OMNI.llm.vocab_size * OMNI.llm.hidden_size
    trained = 2 * len(MARKS) * OMNI.llm.hidden_size if rows else 0
    assert [cell.strip() for cell in line.split("│")[2:6]] == ["llm", f"{size + trained:,}", f"{size:,}", rate]
    marks = next(group for group in group_sizes(run, spec, abstract_state(spec)) if group.name == "marks")
    assert (marks.learning_rate, marks.parameters) == (1e-2 if rows else None, size + trained)
    assert marks.optimizer_bytes == 2 * 4 * trained  # two moments, fp32


def test_what_cannot_be_is_refused():
    names = make_step_spec(run_of(ALL), OMNI, one_device(), make_compute(run_of(ALL))).template
    wrong = dataclasses.replace(ROWS, pattern=r"llm\.")
    with pytest.raises(ConfigError, match=r"group 'marks' is special_tokens_only, but llm\.\S+ has no rows of tokens"):
        assign_groups(named_variables(names), (wrong, FROZEN))
    with pytest.raises(
        ConfigError, match=r"train\.special_token_ids has 4096, which lies outside llm\.vocab_size 1024"
    ):
        special_ids(run_of(ALL, special_token_ids=(57, 4096)), OMNI)
    with pytest.raises(ConfigError, match="freeze every parameter"):
        assign_groups(named_variables(names), (ROWS, FROZEN), special_token_rows=False)
    assert special_ids(run_of(ALL, special_token_ids=(57, 3, 57)), OMNI) == (57, 3)
