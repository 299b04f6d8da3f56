"""Checkpoints: what is read is what was written, whatever happened in between."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from flax import nnx

from baichuan_omni_jax.checkpoint import (
    Parent,
    Workdir,
    kept_steps,
    load_branches,
    parse_spec,
    read_branch_info,
    record_parent,
    save_branches,
)
from baichuan_omni_jax.checkpoint.checksums import CHECKSUMS
from baichuan_omni_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    read_hf,
    tiny,
)
from baichuan_omni_jax.errors import ConfigError, RunStoppedError
from baichuan_omni_jax.nn.param import Buffer, normal, stack

TOKENIZER = '{"version": "1.0", "added_tokens": [{"content": "你好"}]}'
OPTIMIZER = optax.adamw(1e-2)


class Layer(nnx.Module):
    def __init__(self, key: jax.Array) -> None:
        self.kernel = normal(key, (8, 16), ("embed", "mlp"), std=1.0)


class Branch(nnx.Module):
    def __init__(self, key: jax.Array, width: int = 8) -> None:
        self.table = normal(key, (32, width), ("vocab", "embed"), std=1.0)
        self.count = Buffer(jax.random.randint(key, (3,), 0, 100), axes=("small",))
        self.layers = stack(Layer, key, 3)


@jax.jit
def make_state(seed: int = 0) -> tuple[dict[str, Branch], object]:
    """Two branches and the state of an optimizer that trains one of them, after one update."""
    llm, vision = (Branch(key) for key in jax.random.split(jax.random.key(seed)))
    parameters = nnx.state({"llm": llm}, nnx.Param)
    state = OPTIMIZER.init(parameters)
    _, state = OPTIMIZER.update(jax.tree.map(jnp.cos, parameters), state, parameters)
    return {"llm": llm, "vision": vision}, state


def abstract(tree: object, mesh: jax.sharding.Mesh | None = None) -> object:
    """`tree` as ShapeDtypeStructs on one device, or whole on each of `mesh`."""
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_equal(left: object, right: object) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(workdir: Workdir, step: int, branches: object, opt_state: object) -> None:
    workdir.save(step, branches, opt_state, {"cursor": [step, {"bin": "二"}]}, tiny(), TOKENIZER)


def saved_steps(path: Path, steps: tuple[int, ...], keep: int = 5) -> tuple[Workdir, dict, object]:
    """A workdir with these steps; step n holds the state of seed n."""
    workdir = Workdir(path, keep)
    for step in steps:
        branches, opt_state = make_state(step)
        save(workdir, step, branches, opt_state)
    workdir.wait()
    branches, opt_state = make_state()
    return workdir, abstract(branches), abstract(opt_state)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 4
    path.write_bytes(content if how == "flip" else content[: len(content) // 2])


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    branches, opt_state = make_state()
    workdir = Workdir(tmp_path / "run", keep=2)
    save(workdir, 7, branches, opt_state)
    workdir.wait()
    restored = workdir.restore(None, abstract(branches), abstract(opt_state))
    assert_equal(restored.branches, branches)
    assert_equal(restored.opt_state, opt_state)
    assert restored.data_state == {"cursor": [7, {"bin": "二"}]}
    assert (restored.step, workdir.latest_step(), workdir.steps()) == (7, 7, [7])
    assert workdir.has_step(7)
    assert not workdir.has_step(8)
    workdir.close()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_files_of_a_step(tmp_path: Path) -> None:
    saved_steps(tmp_path, (3,))
    folder = tmp_path / "checkpoints" / "3"
    assert read_hf(folder / "config.json") == tiny()
    assert json.loads((folder / "processor" / "tokenizer.json").read_text()) == json.loads(TOKENIZER)
    info = read_branch_info(folder)["llm"]
    assert (info.parameters, info.dtype, info.trained) == (32 * 8 + 3 + 3 * 8 * 16, "float32+int32", 3)
    listed = set(json.loads((folder / "checksums.json").read_text()))
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there - listed == {"checksums.json", "commit_success.txt", "_CHECKPOINT_METADATA"}
    # Plain nested dicts: Orbax alone reads a branch, without our classes.
    plain = ocp.PyTreeCheckpointer().restore(folder / "params" / "llm")
    np.testing.assert_array_equal(plain["layers"]["kernel"], make_state(3)[0]["llm"].layers.kernel[...])


def test_dtype_is_cast_to_what_is_asked(tmp_path: Path) -> None:
    branches, _ = make_state()
    save_branches(tmp_path / "ckpt", branches, tiny())
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), branches)
    loaded = load_branches(str(tmp_path / "ckpt"), abstract(low))
    assert_equal(loaded, low)


def test_buffers_may_be_donated_once_save_returns(tmp_path: Path) -> None:
    branches, opt_state = make_state()
    before = jax.tree.map(lambda x: np.array(x), (branches, opt_state))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    workdir = Workdir(tmp_path, keep=1)
    save(workdir, 1, branches, opt_state)
    target = abstract((branches, opt_state))
    jax.block_until_ready(overwrite((branches, opt_state)))
    restored = workdir.restore(1, *target)
    assert_equal((restored.branches, restored.opt_state), before)


def test_keeps_the_newest_steps(tmp_path: Path) -> None:
    workdir, *_ = saved_steps(tmp_path, (1, 2, 3, 4), keep=2)
    assert workdir.steps() == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_step_that_is_kept_by_name_outlives_newer_ones(tmp_path: Path) -> None:
    """The newest one before step 3; none is found before step 1. Two are kept where a run diverges twice."""
    workdir, *_ = saved_steps(tmp_path, (1, 2, 3), keep=2)
    assert workdir.keep_newest(before=1) is None
    assert workdir.keep_newest(before=3) == 2
    save(workdir, 4, *make_state(4))
    # Not waited for: a run may diverge while its good step is still being written.
    assert workdir.keep_newest(before=5) == 4
    save(workdir, 5, *make_state(5))
    workdir.wait()
    assert workdir.keep_newest(before=5) == 4
    for step in (6, 7):
        save(workdir, step, *make_state(step))
    workdir.wait()
    assert workdir.steps() == [2, 4, 6, 7]
    assert kept_steps(workdir.path) == [2, 4]


def test_a_saved_step_is_not_saved_again(tmp_path: Path) -> None:
    workdir, branches, opt_state = saved_steps(tmp_path, (1,))
    save(workdir, 1, *make_state(2))
    assert_equal(workdir.restore(1, branches, opt_state).branches, make_state(1)[0])


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damaged_step_is_named_and_the_one_before_used(tmp_path: Path, how: str, caplog) -> None:
    workdir, branches, opt_state = saved_steps(tmp_path, (1, 2))
    bad = largest_file(tmp_path / "checkpoints" / "2")
    damage(bad, how)
    with caplog.at_level(logging.WARNING, logger="baichuan_omni_jax"):
        restored = workdir.restore(None, branches, opt_state)
    assert "step 2 is damaged" in caplog.text
    assert str(bad) in caplog.text
    assert restored.step == 1
    assert_equal((restored.branches, restored.opt_state), make_state(1))
    # The run goes on and saves step 2 again, which takes the damaged one's place.
    save(workdir, 2, *make_state(2))
    assert_equal(workdir.restore(None, branches, opt_state).branches, make_state(2)[0])


def test_damaged_steps_do_not_count_as_kept(tmp_path: Path) -> None:
    workdir, branches, opt_state = saved_steps(tmp_path, (1, 5, 6), keep=3)
    damage(largest_file(tmp_path / "checkpoints" / "6" / "opt_state"), "flip")
    damage(tmp_path / "checkpoints" / "5" / "checksums.json", "truncate")
    assert workdir.restore(None, branches, opt_state).step == 1
    save(workdir, 2, *make_state(2))
    workdir.wait()
    assert workdir.steps() == [1, 2]


def test_no_good_step_left(tmp_path: Path) -> None:
    workdir, branches, opt_state = saved_steps(tmp_path, (1, 2))
    for step in "12":
        (tmp_path / "checkpoints" / step / "data.json").unlink()
    message = f"{tmp_path}/checkpoints holds no usable checkpoint: .*/2/data.json is missing or changed"
    with pytest.raises(ConfigError, match=message):
        workdir.restore(None, branches, opt_state)
    with pytest.raises(ConfigError, match="no usable checkpoint of step 1: "):
        workdir.restore(1, branches, opt_state)
    with pytest.raises(ConfigError, match=r"no usable checkpoint of step 9$"):
        workdir.restore(9, branches, opt_state)


def test_every_tensor_must_match(tmp_path: Path) -> None:
    workdir, branches, opt_state = saved_steps(tmp_path, (1,))
    wide = jax.eval_shape(lambda key: Branch(key, width=16), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"branch llm of .*: tensor table has shape \(32, 8\), .* wants \(32, 16\)"):
        workdir.restore(None, {"llm": wide}, opt_state)
    more = jax.eval_shape(lambda key: {"extra": Branch(key)}, jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"branch llm .* lacks tensor extra.count of shape \(3,\), which the model has"
    ):
        workdir.restore(None, {"llm": more}, opt_state)
    with pytest.raises(
        ConfigError, match=r"branch llm .* holds tensor count of shape \(3,\), which the model does not"
    ):
        workdir.restore(None, {"llm": {"layers": branches["llm"].layers, "table": branches["llm"].table}}, opt_state)
    with pytest.raises(ConfigError, match="has no params/flow"):
        workdir.restore(None, {"flow": branches["llm"]}, opt_state)


def test_a_state_without_arrays(tmp_path: Path) -> None:
    branches, _ = make_state()
    workdir = Workdir(tmp_path, keep=1)
    empty = optax.sgd(1.0).init({"w": jnp.zeros(2)})
    save(workdir, 1, branches, empty)
    assert workdir.restore(None, abstract(branches), empty).opt_state == empty


def test_error_of_a_background_save_surfaces(tmp_path: Path, monkeypatch) -> None:
    workdir = Workdir(tmp_path, keep=1)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("baichuan_omni_jax.checkpoint.trees.write_checksums", fail)
    save(workdir, 1, *make_state())
    with pytest.raises(RunStoppedError, match=r"saving step 1 .* failed: disk full"):
        workdir.wait()
    monkeypatch.undo()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    save(workdir, 1, *make_state())
    workdir.close()
    assert workdir.steps() == [1]


def test_error_of_the_start_of_a_save(tmp_path: Path) -> None:
    """A file stands where the checkpoints were."""
    workdir = Workdir(tmp_path, keep=1)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunStoppedError, match=rf"saving step 1 in {tmp_path} failed: .*Not a directory"):
        save(workdir, 1, *make_state())


def test_leftovers_are_removed_at_the_next_start(tmp_path: Path) -> None:
    saved_steps(tmp_path, (1,))
    steps = tmp_path / "checkpoints"
    (steps / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (steps / "3" / "params").mkdir(parents=True)
    workdir = Workdir(tmp_path, keep=1)
    assert workdir.steps() == [1]
    workdir.write_run_config(RunConfig(name="x"))
    assert [path.name for path in steps.iterdir()] == ["1"]


def test_run_config(tmp_path: Path) -> None:
    run = RunConfig(name="a", data=DataConfig(mixture=(SourceConfig(name="s", manifest="m"),)))
    Workdir(tmp_path, 1).write_run_config(run)
    longer = replace(
        run,
        train=TrainConfig(steps=7),
        checkpoint=CheckpointConfig(every=3),
        mesh=MeshConfig(fsdp=2),
        data=replace(run.data, workers=0, root="/elsewhere", rows=32),
    )
    Workdir(tmp_path, 1).write_run_config(longer)
    stored = (tmp_path / "run_config.json").read_text()
    assert json.loads(stored)["train"]["steps"] == 7
    heavier = replace(run, data=replace(run.data, mixture=(SourceConfig(name="s", manifest="m", weight=2.0),)))
    for other, message in (
        (replace(run, train=TrainConfig(seed=5)), "train.seed is 0 there and 5 here"),
        (heavier, "data.mixture.0.weight is 1.0 there and 2.0 here"),
        (replace(run, data=DataConfig()), "data.mixture.0.name is 's' there and 'absent' here"),
    ):
        with pytest.raises(ConfigError, match=message):
            Workdir(tmp_path, 1).write_run_config(other)
    assert (tmp_path / "run_config.json").read_text() == stored


def test_a_refused_run_gives_its_workdir_up(tmp_path: Path) -> None:
    """A new one without a step, to any run; what it found there stays."""
    first, other = RunConfig(name="a"), RunConfig(name="a", train=TrainConfig(seed=5))
    workdir = Workdir(tmp_path / "w", 1)
    workdir.write_run_config(first)
    record_parent(workdir.path, Parent())
    (tmp_path / "w" / "audio_tokenizer").mkdir()
    workdir.give_up()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["checkpoints"]
    Workdir(tmp_path / "w", 1).write_run_config(other)
    # Its own configuration was there before this start, or a step has been made since.
    again = Workdir(tmp_path / "w", 1)
    again.write_run_config(other)
    again.give_up()
    assert (tmp_path / "w" / "run_config.json").exists()
    with_step = Workdir(tmp_path / "x", 1)
    with_step.write_run_config(first)
    (tmp_path / "x" / "checkpoints" / "1").mkdir()
    (tmp_path / "x" / "checkpoints" / "1" / CHECKSUMS).write_text("{}")
    with_step.give_up()
    assert (tmp_path / "x" / "run_config.json").exists()


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"):
        Workdir(tmp_path / "file", keep=1)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep must be at least 1"):
        Workdir(tmp_path / "w", keep=0)
    with pytest.raises(ConfigError, match="already exists and is not empty"):
        save_branches(tmp_path, make_state()[0], tiny())
    with pytest.raises(ConfigError, match=r"tokenizer .*/none.json cannot be read"):
        save_branches(tmp_path / "c", make_state()[0], tiny(), str(tmp_path / "none.json"))
    assert not (tmp_path / "c").exists()


def test_where_branches_come_from(tmp_path: Path) -> None:
    workdir, target, _ = saved_steps(tmp_path / "run", (1, 2))
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    save_branches(ckpt, {"vision": make_state(9)[0]["vision"]}, tiny(), str(tmp_path / "tokenizer.json"))
    assert (ckpt / "processor" / "tokenizer.json").read_text() == TOKENIZER
    assert read_branch_info(ckpt)["vision"].trained == 0

    for spec, step in ((workdir.path, 2), (workdir.path / "checkpoints" / "1", 1)):
        assert_equal(load_branches(str(spec), target), make_state(step)[0])
    both = load_branches(f"llm={workdir.path},vision={ckpt}", target)
    assert_equal(both, {"llm": make_state(2)[0]["llm"], "vision": make_state(9)[0]["vision"]})

    damage(largest_file(tmp_path / "run" / "checkpoints" / "2" / "params"), "flip")
    assert_equal(load_branches(str(workdir.path), target), make_state(1)[0])

    with pytest.raises(ConfigError, match=f"checkpoint {ckpt} has no branch llm; it has vision"):
        load_branches(str(ckpt), target)
    with pytest.raises(ConfigError, match="names no branch llm"):
        load_branches(f"vision={ckpt}", target)
    assert list(load_branches(str(ckpt), target, allow_missing=True)) == ["vision"]
    with pytest.raises(ConfigError, match=r"is the folder of several runs: name one of them \(.*run"):
        load_branches(str(tmp_path), target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is neither a checkpoint"):
        load_branches(str(tmp_path / "empty"), target)
    damage(largest_file(ckpt / "params"), "truncate")
    with pytest.raises(ConfigError, match=f"checkpoint {ckpt} is damaged: params/vision/"):
        load_branches(f"vision={ckpt}", {"vision": target["vision"]})


def test_written_by_tensorstore(tmp_path: Path) -> None:
    """What a conversion needs to write, tensor by tensor and without Orbax, to be read as a branch."""
    values = {"layers.kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(2, jnp.bfloat16)}
    folder = tmp_path / "params" / "llm"
    tree = {}
    for name, value in values.items():
        store = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store, "metadata": {"chunks": [1] * value.ndim}}
        array = ts.open(spec, create=True, dtype=value.dtype, shape=value.shape).result()
        array[...] = value
        keys = [{"key": part, "key_type": 2} for part in name.split(".")]
        tree[str(tuple(name.split(".")))] = {
            "key_metadata": keys,
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}))
    (tmp_path / "branches.json").write_text("{}")

    wanted = {"layers": {"kernel": jnp.asarray(values["layers.kernel"])}, "bias": jnp.asarray(values["bias"])}
    assert_equal(load_branches(str(tmp_path), {"llm": abstract(wanted)}), {"llm": wanted})
    for data in (folder / "d").iterdir():
        data.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"branch llm of \S+: tensor \S+ in \S+ is missing or changed \("):
        load_branches(str(tmp_path), {"llm": abstract(wanted)})


def test_spec() -> None:
    assert parse_spec("gs://a/b", ("llm", "flow")) == {"llm": "gs://a/b", "flow": "gs://a/b"}
    for spec, message in (
        ("llm=a,b", "neither DIR nor branch=DIR"),
        ("lm=a", "names branch 'lm'; this model has llm"),
        ("llm=a,llm=b", "twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_spec(spec, ("llm",))
