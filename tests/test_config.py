"""Configurations: overrides, dicts, the Hugging Face form, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from baichuan_omni_jax.config import (
    ConfigError,
    RunConfig,
    apply_overrides,
    baichuan_omni_7b,
    from_dict,
    from_hf,
    load_run_config,
    read_hf,
    resolve_model,
    tiny,
    to_dict,
    to_hf,
)
from tests.golden import golden_path

ROOT = Path(__file__).resolve().parents[1]


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
    ],
)
def test_bad_overrides_are_told(override, message):
    with pytest.raises(ConfigError) as error:
        apply_overrides(RunConfig(name="x"), [override])
    assert message in str(error.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path):
    run = load_run_config(path)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert f"configs/{path.name}" in path.read_text(encoding="utf-8").split('"""')[1], "its launch command"
    resolve_model(run.model)


def test_missing_config_and_model_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"config file .*none\.py does not exist"):
        load_run_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.py defines no get_config"):
        load_run_config(tmp_path / "empty.py")
    with pytest.raises(ConfigError, match="model 'huge' is neither a variant"):
        resolve_model("huge")


@pytest.mark.parametrize("omni", [tiny(), baichuan_omni_7b()], ids=["tiny", "7b"])
def test_hf_round_trip(omni):
    assert from_hf(json.loads(json.dumps(to_hf(omni)))) == omni


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
