"""Configurations: overrides, dicts, the Hugging Face form, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from baichuan_omni_jax.config import (
    AUDIO_RUNS,
    MACHINES,
    MODELS,
    STAGES,
    GenerationConfig,
    RunConfig,
    apply_overrides,
    baichuan_omni_7b,
    from_dict,
    from_hf,
    load_run_config,
    omni_0b5,
    omni_1b5,
    omni_14b,
    read_hf,
    resolve_model,
    small,
    tiny,
    to_dict,
    to_hf,
)
from baichuan_omni_jax.config.overrides import RENAMED
from baichuan_omni_jax.config.recipes import SMALL
from baichuan_omni_jax.errors import ConfigError
from tests.helpers.golden import golden_path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def test_overrides_reach_nested_fields_and_keep_types():
    run = RunConfig(name="x")
    changed = apply_overrides(
        run,
        ["train.steps=20", "data.budgets.tokens=1024", "optimizer.clip_norm=2", "data.tokenizer=7", "data.sample=true"],
    )
    assert changed.train.steps == 20
    assert changed.data.budgets.tokens == 1024
    assert changed.optimizer.clip_norm == 2.0
    assert isinstance(changed.optimizer.clip_norm, float)
    assert changed.data.tokenizer == "7"
    assert changed.data.sample is True
    assert run.train.steps == 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=20", "unknown config key train.step; the nearest known one is train.steps"),
        ("trian.steps=20", "unknown config key trian; the nearest known one is train"),
        ("train.steps=2.5", "train.steps must be int, not 2.5"),
        ("data.weights_by=words", "data.weights_by must be one of documents, tokens, trainable, not 'words'"),
        ("train.document_weighting=1", "train.document_weighting must be one of token, sqrt, document, not 1"),
        ("train.steps=true", "train.steps must be int, not True"),
        ("train.steps.more=1", "train.steps.more: steps is a int and has no field 'more'"),
        ("train.steps", "'train.steps' is not of the form key=value"),
        ("data.mixture=3", "data.mixture must be a list, not 3"),
        ("watch.hang_s=-1", "watch.hang_s must be at least 0, not -1.0"),
        ("watch.update_share=0", "watch.update_share must be at least 0.001, not 0.0"),
        ("watch.spike=1e400", "watch.spike must be a number, not inf"),
        ("watch.pause_s=" + "9" * 400, "watch.pause_s must be a number, not one so large"),
        ("checkpoint.every=0", "checkpoint.every must be at least 1, not 0"),
        ("compute.attention_block=0", "compute.attention_block must be at least 1, not 0"),
        ("compute.loss_chunk=-1", "compute.loss_chunk must be at least 0, not -1"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1, not 0"),
        ("checkpoint.local_every=-1", "checkpoint.local_every must be at least 0, not -1"),
        ("data.patience=-1", "data.patience must be at least 0, not -1.0"),
        ("data.workers=100000", "data.workers must be at least 0 and at most 1024, not 100000"),
        ("data.max_unprepared_mb=-2", "data.max_unprepared_mb must be at least -1, not -2"),
        ("data.rows=" + "(" * 5000, "data.rows must be int, not '((("),
    ],
)
def test_bad_overrides_are_refused_by_name(override, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(RunConfig(name="x"), [override])
    assert message in str(error.value)


FIELDS = {
    "watch=WatchConfig(hang_s='3')": "watch.hang_s must be float, not '3'",
    "watch=WatchConfig(silent_s=float('nan'))": "watch.silent_s must be a number, not nan",
    "checkpoint=CheckpointConfig(every='2')": "checkpoint.every must be int, not '2'",
    "checkpoint=CheckpointConfig(local_dir=None)": "checkpoint.local_dir must be str, not None",
    "data=DataConfig(cache_gb=-1)": "data.cache_gb must be at least 0, not -1.0",
    "data=DataConfig(mixture=(SourceConfig(name='a', manifest=3),))": "data.mixture[0].manifest must be str, not 3",
    "train=TrainConfig(steps=2.5)": "train.steps must be int, not 2.5",
}


def test_values_of_a_config_file_are_looked_at_as_those_of_the_command_line(tmp_path):
    """In a process of its own: the tests' own checks of types would come first."""
    script = ["from baichuan_omni_jax.config import *", "from baichuan_omni_jax.errors import exit_code"]
    for place, field in enumerate(FIELDS):
        path = tmp_path / f"{place}.py"
        path.write_text(f"{script[0]}\ndef get_config():\n    return RunConfig(name='x', {field})\n")
        script.append(f"print(exit_code(lambda: print(load_run_config({str(path)!r}))))")
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"] * len(FIELDS)
    assert done.stderr.splitlines() == [f"error: {message}" for message in FIELDS.values()]


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(old, new):
    config = RunConfig(name="x") if "." in old else GenerationConfig()
    message = f"config key {re.escape(old)} is now {re.escape(new)}$"
    with pytest.raises(ConfigError, match=message):
        apply_overrides(config, [f"{old}=1"])
    *sections, key = new.split(".")
    values = section = to_dict(config)
    for name in sections:
        section = section[name]
    section[old.rpartition(".")[2]] = section.pop(key)
    with pytest.raises(ConfigError, match=message):
        from_dict(type(config), values)


def test_a_config_file_with_a_renamed_field_is_refused_with_the_new_name(tmp_path):
    (tmp_path / "old.py").write_text(
        "from baichuan_omni_jax.config import EvalConfig\n\n\ndef get_config():\n    return EvalConfig(sound_every=3)\n"
    )
    with pytest.raises(ConfigError, match=r"old\.py, line 5: TypeError: .*'sound_every': it is now eval\.audio_every$"):
        load_run_config(tmp_path / "old.py")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_every_config_loads_and_survives_json(path):
    run = load_run_config(path)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert path.relative_to(ROOT).as_posix() in path.read_text(encoding="utf-8").split('"""')[1], "its launch command"
    resolve_model(run.model)


@pytest.mark.parametrize("name", [f"{name}{size}" for name in (*STAGES, *AUDIO_RUNS) for size in ("", "_tiny")])
def test_a_run_of_the_recipe_needs_no_file_and_its_file_is_the_same(name):
    assert load_run_config(name) == load_run_config(ROOT / "configs" / f"{name}.py")


@pytest.mark.parametrize("stage", SMALL.stages, ids=lambda stage: stage.name)
def test_a_run_of_the_small_recipe_needs_no_file_and_its_file_is_the_same(stage):
    own = load_run_config(stage.name)
    assert own == load_run_config(ROOT / "configs" / "small" / f"{stage.name.removesuffix('_small')}.py")
    assert own.name == stage.name


def test_model_and_machine_size_the_whole_run_before_other_overrides():
    changes = ["data.rows=8", "model=omni_0b5", "train.accumulate=1", "machine=v5e:2x4"]
    run = load_run_config(ROOT / "configs" / "sft.py", changes)
    assert (run.model, run.machine, run.mesh.context) == ("omni_0b5", "v5e:2x4", 8)
    assert (run.data.rows, run.train.accumulate) == (8, 1)
    # A file of one size keeps it: there the model is a field as any other.
    assert load_run_config(ROOT / "configs" / "micro.py", ["model=omni_0b5"]).model == "omni_0b5"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ("sft", "machine=v9:2x2", r"machine 'v9:2x2' is not one that the recipe has sizes for \(h100:1, v5e:2x4, "),
        (
            ROOT / "configs" / "micro.py",
            "machine=v5e:2x4",
            r"micro\.py is not sized by machine: set mesh, data",
        ),
        ("sft", "model=huge", "model 'huge' is neither a variant"),
        ("sftt", "model=tiny", r"config file sftt does not exist, nor a run of that name \(audio_tokenizer, "),
        ("flow_matching", "machine=v9:2x2", r"machine 'v9:2x2' is not one that the recipe has sizes for \(h100:1, "),
        ("audio_tokenizer_tiny", "machine=v5e:2x4", "audio_tokenizer_tiny is not sized by machine: set mesh, data"),
    ],
)
def test_what_cannot_be_sized_is_refused_by_name(config, change, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(config, [change])


def test_a_model_of_a_file_is_sized_as_the_smallest_named_one_that_holds_it(tmp_path):
    """1.2 B parameters of another depth are laid out as `omni_1b5`; 30 B as nothing."""
    between = omni_1b5()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(replace(between, llm=replace(between.llm, num_layers=16)))))
    run = load_run_config("sft", [f"model={path}", "machine=h100:1"])
    named = load_run_config("sft", ["model=omni_1b5", "machine=h100:1"])
    assert replace(run, model="omni_1b5") == named
    large = omni_14b()
    path.write_text(json.dumps(to_hf(replace(large, llm=replace(large.llm, num_layers=96)))))
    with pytest.raises(ConfigError, match=r"config\.json: 28\.0 B parameters are more than the recipe has sizes for"):
        load_run_config("sft", [f"model={path}"])


@pytest.mark.parametrize("machine", [machine for machine in MACHINES if machine != "v6e:16x16"])
@pytest.mark.parametrize("name", AUDIO_RUNS)
def test_a_large_encoder_beside_a_small_language_model_is_sized_for(name, machine, tmp_path):
    """In the runs that compute it: for the stages, which read its codes, the language model alone decides."""
    mixed = replace(omni_0b5(), audio=baichuan_omni_7b().audio)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_hf(mixed)))
    changes = [f"machine={machine}"]
    assert replace(load_run_config(name, [*changes, f"model={path}"]), model="omni_3b") == load_run_config(
        name, [*changes, "model=omni_3b"]
    )
    assert replace(load_run_config("sft", [*changes, f"model={path}"]), model="omni_0b5") == load_run_config(
        "sft", [*changes, "model=omni_0b5"]
    )
    path.write_text(json.dumps(to_hf(replace(mixed, audio=replace(mixed.audio, encoder_layers=64)))))
    with pytest.raises(ConfigError, match=r"0\.6 B parameters and an audio encoder of 1\.3 B are more than the recipe"):
        load_run_config(name, [*changes, f"model={path}"])


def test_missing_config_and_model_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"config file .*none\.py does not exist"):
        load_run_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py defines no get_config"):
        load_run_config(tmp_path / "empty.py")
    with pytest.raises(ConfigError, match="model 'huge' is neither a variant"):
        resolve_model("huge")


@pytest.mark.parametrize("omni", [make() for make in MODELS.values()], ids=MODELS)
def test_hf_round_trip(omni):
    assert from_hf(json.loads(json.dumps(to_hf(omni)))) == omni


def test_a_temperature_below_zero_is_refused_by_name():
    values = to_hf(small())
    values["flow_matching_config"]["cfm_params"]["temperature"] = -0.5
    with pytest.raises(ConfigError, match=r"flow_matching_config\.cfm_params\.temperature = -0\.5 must be at least 0"):
        from_hf(values)


def test_the_golden_config_is_read():
    omni = read_hf(golden_path("omni_a/config.json"))
    assert (omni.llm.num_kv_heads, omni.vision.depth, omni.audio.codebook_sizes[:2]) == (2, 3, (64, 48))
    assert (omni.tokens.audiogen_start, omni.vision.frame_limits.max_pixels) == (472, 602112)
    assert from_hf(to_hf(omni)) == omni


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "position_embedding_type", "alibi"),
        ("", "sparse_attention_heads", [0, 1]),
        ("", "use_sliding_window", True),
        ("flow_matching_config", "use_hires_mel", False),
        ("flow_matching_config", "unet_use_omni_attn", True),
        ("flow_matching_config", "use_hidden_states_before_dconv2", False),
        ("flow_matching_config", "spk_emb_dim", 64),
        ("flow_matching_config", "prenet_target_mel_length_scale_ratio", 2.0),
    ],
)
def test_unsupported_hf_fields_are_refused_by_name(section, key, value):
    values = to_hf(tiny())
    (values[section] if section else values)[key] = value
    with pytest.raises(ConfigError) as error:
        from_hf(values)
    assert f"{section}.{key}".lstrip(".") in str(error.value)


def as_transformers_5(values: dict) -> dict:
    """A config as `PretrainedConfig.save_pretrained` of transformers 5 writes it."""
    values = dict(values)
    values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    values["dtype"] = values.pop("torch_dtype")
    values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    del values["rope_scaling"]
    return values


@pytest.mark.parametrize("omni", [tiny(), baichuan_omni_7b()], ids=["tiny", "7b"])
def test_a_config_of_transformers_5_is_the_same(omni):
    values = as_transformers_5(to_hf(omni))
    assert from_hf(values) == omni
    assert from_hf(values | {"rope_theta": omni.llm.rope_theta, "rope_scaling": values["rope_parameters"]}) == omni
    assert from_hf(to_hf(omni) | {"rope_scaling": {"type": "default"}}) == omni


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_parameters.rope_type = 'yarn' is not"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention = {} is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_theta is given twice: 10000.0 in rope_"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_parameters": [1e6]}, "rope_parameters must be an object, not [1000000.0]"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type = 'linear' is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8) is not supported"),
        ({"hidden_size": "128"}, "hidden_size must be int, not '128'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 must be at least 1"),
        ({"audio_config": None}, "audio_config.sampling_rate is missing"),
        ({"visual_config": 7}, "visual_config must be an object, not 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_means_another_model_is_refused(change, sentence):
    with pytest.raises(ConfigError) as error:
        from_hf(as_transformers_5(to_hf(tiny())) | change)
    assert str(error.value).startswith(sentence)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 16060\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (LFS_POINTER, "is a pointer of Git LFS (to 16,060 bytes), not the file itself"),
        (b"/annex/objects/SHA256E-s1--0.json\n", "is a pointer of git-annex"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not the file itself"),
        (b"", "is empty"),
        (b"[1]", "is no JSON object but list"),
        (b"\xff\xfe{}", "cannot be read as JSON: 'utf-8' codec can't decode"),
        (b"{", "cannot be read as JSON"),
    ],
    ids="lfs annex html empty list bytes cut".split(),
)
def test_what_stands_in_place_of_a_config_is_called_by_its_name(tmp_path, content, sentence):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_hf(tmp_path / "config.json")
    assert str(error.value).startswith(f"{tmp_path / 'config.json'} {sentence}")


def test_a_mark_of_byte_order_is_no_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny())), encoding="utf-8-sig")
    assert read_hf(tmp_path / "config.json") == tiny()


def test_missing_hf_field_is_named():
    values = to_hf(tiny())
    del values["audio_config"]["d_model"]
    with pytest.raises(ConfigError, match=r"audio_config\.d_model is missing"):
        from_hf(values)


def test_parts_that_do_not_fit_are_refused():
    omni = tiny()
    with pytest.raises(ConfigError, match=r"vision\.out_dim 64 must equal llm\.hidden_size 128"):
        replace(omni, vision=replace(omni.vision, out_dim=64))
    with pytest.raises(ConfigError, match=r"tokens\.audiogen_end lies outside llm\.vocab_size 58"):
        replace(omni, llm=replace(omni.llm, vocab_size=58))


def test_importing_the_configuration_imports_no_jax():
    code = "import sys, baichuan_omni_jax.config; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
