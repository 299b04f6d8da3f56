"""What cannot be used is said in one sentence, exit code 2, nothing overwritten; a bad document is passed over."""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from baichuan_omni_jax.checkpoint import Workdir
from baichuan_omni_jax.config import apply_overrides, load_run_config, resolve_model
from baichuan_omni_jax.errors import ConfigError, exit_code
from baichuan_omni_jax.sharding import MESH_AXES
from baichuan_omni_jax.train.input import check_audio_run, check_batch
from baichuan_omni_jax.train.run import train
from baichuan_omni_jax.train.state import make_compute
from data_pipelines.packing.rows import ALL_ROWS
from data_pipelines.pipeline import TrainingData, open_pipeline
from tests.helpers.micro import CONFIG, STEPS, contents, micro_run, open_micro, overrides, read_metrics, wait_until

TINY = resolve_model("tiny")


@pytest.fixture
def refusal(capsys) -> Callable[[Callable[[], object]], str]:
    """Runs a command as the launch scripts do and returns its one sentence: exit code 2, one line on stderr."""

    def sentence(command) -> str:
        capsys.readouterr()
        assert exit_code(command) == 2
        return only_sentence(capsys.readouterr().err)

    return sentence


def only_sentence(err: str) -> str:
    # What is logged is no sentence of the refusal; other tests of the process may have turned it on.
    lines = [line for line in err.strip().splitlines() if not re.match(r"[IW]\d{4} ", line)]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def test_weights_in_the_loss_that_cannot_be(refusal, micro_root):
    """Of a source, before it is indexed; of documents, in a task that does not weigh by them."""
    run = micro_run(micro_root, "data.mixture=[{'name': 'text', 'manifest': 'text.jsonl', 'loss_weight': 0.0}]")
    assert refusal(lambda: open_pipeline(run.data, TINY)) == "source text: loss_weight 0.0 must be positive"
    audio = load_run_config(CONFIG.with_name("audio_tokenizer_tiny.py"))
    sets = ["train.document_weighting=sqrt"], ["data.mixture=[{'name': 'a', 'manifest': 'a.jsonl', 'loss_weight': 2}]"]
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    check = lambda run: check_audio_run(run, TINY, mesh, make_compute(run), run.branches, ())  # noqa: E731
    sentences = [refusal(lambda: check(apply_overrides(audio, changes))) for changes in sets]  # noqa: B023
    assert sentences[0].startswith("train.document_weighting must be token: task audio_tokenizer")
    assert sentences[1] == "source a: loss_weight must be 1 in task audio_tokenizer, not 2.0"


def test_unknown_key_names_the_nearest(pretrain, tmp_path):
    """Through the command itself: exit code, stderr, and no workdir made."""
    done = pretrain(tmp_path / "run", "train.step=20")
    assert done.returncode == 2
    assert only_sentence(done.stderr) == "unknown config key train.step; the nearest known one is train.steps"
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.clip_norm=1", "unknown config key optimiser; the nearest known one is optimizer"),
        ("data.budgets.token=64", "the nearest known one is data.budgets.tokens"),
        ("train.steps=many", "train.steps must be int, not 'many'"),
        ("train.steps", "--set 'train.steps' is not of the form key=value"),
        ("=x", "--set '=x' is not of the form key=value"),
        ("model", "--set 'model' is not of the form key=value"),
        ("model=", "model '' is neither a variant"),
        ("machine=V5E:2x4", "machine 'V5E:2x4' is not one that the recipe has sizes for (h100:1, "),
        ("optimizer.moments_dtype=int8", "optimizer.moments_dtype must be one of bfloat16, float32, not 'int8'"),
    ],
)
def test_overrides_that_do_not_fit(refusal, override, message):
    assert message in refusal(lambda: load_run_config("sft", [override]))


def test_missing_config_file(refusal, tmp_path):
    path = tmp_path / "none.py"
    said = refusal(lambda: load_run_config(path))
    assert said.startswith(f"config file {path} does not exist, nor a run of that name (audio_tokenizer, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import jax\ndef get_config(:\n", ", line 2: SyntaxError: it is not Python: invalid syntax"),
        (
            "from baichuan_omni_jax.config import TrainConfig\n\ndef get_config():\n    return TrainConfig(step=2)\n",
            ", line 4: TypeError: ",
        ),
        ("from baichuan_omni_jax.config import Budget\n", ", line 1: ImportError: cannot import name 'Budget'"),
        ("\0", ": "),
    ],
)
def test_config_files_that_fail(refusal, tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert refusal(lambda: load_run_config(path)).startswith(f"config file {path}{message}")


def test_missing_manifest(refusal, micro_root):
    run = micro_run(micro_root)
    data = replace(run.data, mixture=(replace(run.data.mixture[0], manifest="none.jsonl"),))
    message = refusal(lambda: open_pipeline(data, TINY))
    assert f"{micro_root / 'none.jsonl'} cannot be read: No such file or directory" in message


def test_mesh_that_does_not_cover_the_devices(refusal, micro_root, tmp_path):
    run = micro_run(micro_root, "mesh.fsdp=64")
    workdir = Workdir(tmp_path / "run", keep=1)
    data = TrainingData(*open_micro(run, tmp_path / "codes"), ALL_ROWS)
    message = refusal(lambda: train(run, TINY, workdir, data))
    assert message == f"mesh 1x64x1x1 (data x fsdp x context x tensor) does not cover the {jax.device_count()} devices"


@pytest.mark.slow
def test_mesh_that_does_not_divide_a_parameter(pretrain, tmp_path):
    """Eight devices along `tensor`, but four heads: the command names parameter, dimension and axis."""
    done = pretrain(tmp_path / "run", "mesh.tensor=8", "data.media_shards=8", devices=8)
    assert done.returncode == 2
    message = only_sentence(done.stderr)
    assert "k_proj.bias: dimension kv_heads of 2 is not divisible by 8" in message
    assert " is not divisible by 8, the mesh axes tensor" in message
    assert not read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((1, 4, 1, 1), (), "data.rows 2 is not divisible by 4 (mesh.data 1 x mesh.fsdp 4 x train.accumulate 1)"),
        (
            (2, 1, 1, 1),
            ("train.accumulate=2",),
            "data.rows 2 is not divisible by 4 (mesh.data 2 x mesh.fsdp 1 x train.accumulate 2)",
        ),
        (
            (1, 1, 4, 1),
            ("data.context_block=128",),
            "data.budgets.tokens 256 is not divisible by 512 (mesh.context 4 x data.context_block 128)",
        ),
        (
            (1, 1, 2, 2),
            ("data.context_block=64", "data.media_shards=2"),
            "data.media_shards 2 is not divisible by 4 (mesh.context 2 x mesh.tensor 2)",
        ),
        ((1, 1, 1, 1), ("train.nonfinite_limit=0",), "train.nonfinite_limit must be at least 1, not 0"),
    ],
)
def test_batch_that_the_mesh_does_not_divide(refusal, micro_root, sizes, changes, message):
    # Only the mesh's shape is asked for, so one device may stand in all places.
    devices = np.array(jax.devices()[:1] * math.prod(sizes)).reshape(sizes)
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * 4)
    run = micro_run(micro_root, *changes)
    assert refusal(lambda: check_batch(run, TINY, mesh, make_compute(run).rules)) == message


def test_workdir_of_another_config(refusal, micro_root, tmp_path):
    path = tmp_path / "run"
    Workdir(path, keep=3).write_run_config(micro_run(micro_root))
    before = contents(path)
    other = micro_run(micro_root, "compute.loss_chunk=64")
    message = refusal(lambda: Workdir(path, keep=3).write_run_config(other))
    assert f"workdir {path} belongs to another run: compute.loss_chunk is 128 there and 64 here" in message
    assert contents(path) == before


@pytest.mark.slow
def test_a_refused_first_start_leaves_the_workdir_to_the_corrected_one(quick_pretrain, tmp_path):
    """Weights are read last: by then the workdir holds the run's configuration, parent and audio tokenizer."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "branches.json").write_text("{}")
    refused = quick_pretrain(tmp_path / "run", f"checkpoint.init_from={tmp_path / 'weights'}")
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.strip().splitlines()[-1].endswith("weights has no branch llm; it has none")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"checkpoints", ".lock"}
    corrected = quick_pretrain(tmp_path / "run", "train.steps=1")
    assert corrected.returncode == 0, corrected.stderr


def test_mel_slots_are_checked_before_the_data_are_read(refusal, tmp_path):
    audio = load_run_config(CONFIG.with_name("audio_tokenizer_tiny.py"), ["data.mel_frames=(400,200)"])
    message = refusal(lambda: open_pipeline(replace(audio.data, root=str(tmp_path)), TINY))
    assert message.startswith("data.mel_frames (400, 200) must ascend from at least 8 to at most 3000")


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_is_at_work(pretrain, tmp_path):
    """As a scheduler that tries again starts the same command. A killed run leaves the workdir to the next."""
    workdir = tmp_path / "run"
    with pretrain.start(workdir, "train.steps=100000") as first:
        try:
            lock = workdir / ".lock"
            assert wait_until(first, lambda: lock.exists() and lock.read_text().endswith("\n"))
            second = pretrain(workdir, "train.steps=100000")
        finally:
            first.kill()
    assert second.returncode == 2
    sentence = f"error: workdir {workdir} is in use by another run; nothing was changed (process {first.pid} on "
    assert second.stderr.strip().splitlines()[-1].startswith(sentence)
    Workdir(workdir, keep=1).hold()


@pytest.mark.slow
def test_workdir_with_only_a_damaged_checkpoint(finished, pretrain, tmp_path):
    """One flipped bit: the command names the file and leaves everything as it is."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    for step in Workdir(workdir, keep=3).steps()[:-1]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    folder = workdir / "checkpoints" / str(STEPS) / "params" / "llm"
    victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    kept = contents(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_bytes()
    done = pretrain(workdir, f"train.steps={STEPS}")
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"error: {workdir / 'checkpoints'} holds no usable checkpoint: ")
    assert f"{victim.name} is missing or changed" in message
    assert "Traceback" not in done.stderr
    assert (contents(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_bytes()) == kept


@pytest.fixture
def damaged_root(micro_root, tmp_path) -> Path:
    """The micro data with one manifest line that is no JSON, and one image that is none (its header is whole)."""
    root = shutil.copytree(micro_root, tmp_path / "data", copy_function=os.link)
    manifest = root / "text.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.unlink()
    manifest.write_text("".join([*lines[:3], '{"text": oh\n', *lines[4:]]))
    return root


def test_too_many_bad_documents(refusal, damaged_root):
    """The index counts one of 120 documents: a limit of 0.5 % stops, naming the cause; decoding adds to the count."""
    strict = micro_run(damaged_root, "data.max_bad_fraction=0.005")
    message = refusal(lambda: open_pipeline(strict.data, TINY))
    assert message == "1 of 120 documents are unusable (1 bad_json), more than data.max_bad_fraction 0.005"
    run = micro_run(damaged_root, "data.max_bad_fraction=0.01")
    data = TrainingData(*open_micro(run, damaged_root / "codes"), ALL_ROWS)
    data.check_failed(Counter())
    with pytest.raises(ConfigError, match=r"2 of 120 documents are unusable \(1 bad_json, 1 unreadable\)"):
        data.check_failed(Counter({"unreadable": 1}))


@pytest.mark.slow
def test_bad_documents_below_the_limit_are_counted_and_named_once(pretrain, damaged_root, tmp_path):
    """Every image of the image source is cut off after its header: found at decode, counted, and the run goes on."""
    lines = (damaged_root / "image.jsonl").read_text().splitlines()
    names = {name for line in lines for name in _media(json.loads(line)["text"]) if name.endswith((".jpg", ".png"))}
    for name in names:
        path = damaged_root / name
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2])
    sets = [item.replace(str(pretrain.root), str(damaged_root)) for item in overrides(pretrain.root)]
    done = pretrain(tmp_path / "run", *sets, "data.max_bad_fraction=0.9", "train.steps=3")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    skipped = rows[-1]["skipped"]
    assert skipped["bad_json"] == 1
    assert sum(skipped.values()) > 1, "no cut image was met in three steps"
    assert done.stderr.count("skipped text.jsonl:4 (bad_json)") == 1
    named = [line for line in done.stderr.splitlines() if "skipped " in line]
    assert len(named) == len(set(named)) == sum(skipped.values())
    assert any("image.jsonl:" in line for line in named)


def _media(text: str) -> list[str]:
    """Paths of the JSON media tags in a prompt."""
    tags = [part.split("}")[0] for part in text.split("{")[1:]]
    return [value for tag in tags for value in json.loads("{" + tag + "}").values()]
