"""Whole checkpoints there and back: every byte of every tensor, whatever the sizes, and what Orbax makes of ours."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from baichuan_omni_jax.checkpoint import abstract_branches, load_branches, read_branch_info, save_branches
from baichuan_omni_jax.config import OmniConfig, read_hf, tiny
from baichuan_omni_jax.config.vocoder import tiny_vocoder
from baichuan_omni_jax.convert import (
    SafetensorsFile,
    branch_rules,
    convert_to_jax,
    convert_to_torch,
    leaf_store,
    load_branch_from_safetensors,
    open_source,
    open_weights,
    plan_to_jax,
    plan_to_torch,
    safetensors_io,
)
from baichuan_omni_jax.convert.safetensors_io import TensorInfo, write_shards
from baichuan_omni_jax.convert.synthetic import write_random_checkpoint
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import named_values
from tests.helpers.golden import golden_path

TOKENIZER = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "modeling_omni.py": "# code\n"}


def other_sizes() -> OmniConfig:
    """Three KV heads, three mid blocks, unpacked Q, K, V, other codebooks and depths than `tiny`."""
    small = tiny()
    return replace(
        small,
        vision=replace(small.vision, depth=1, num_heads=4),
        audio=replace(small.audio, codebook_sizes=(40, 24, 12), encoder_layers=3, decoder_layers=1),
        llm=replace(small.llm, num_heads=6, num_kv_heads=3, num_layers=2, qkv_pack=False),
        flow=replace(small.flow, num_mid_blocks=3, n_blocks=1, prenet_layers=1),
    )


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory) -> Path:
    """Two shards of random bits, tokenizer files, a vocoder and its sizes."""
    folder = tmp_path_factory.mktemp("random") / "hf"
    write_random_checkpoint(folder, other_sizes(), shards=2, vocoder=tiny_vocoder())
    for name, text in TOKENIZER.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def converted(random_checkpoint: Path) -> Path:
    target = random_checkpoint.parent / "ours"
    convert_to_jax(random_checkpoint, target, vocoder=random_checkpoint / "vocoder.safetensors")
    return target


def assert_same_tensors(left, right) -> None:
    assert left.infos == right.infos
    for name in left.infos:
        assert left.read(name).tobytes() == right.read(name).tobytes(), name


def test_golden(tmp_path: Path) -> None:
    golden, ours, back = golden_path("omni_a"), tmp_path / "ours", tmp_path / "back"
    convert_to_jax(golden, ours, vocoder=golden / "vocoder.safetensors")
    convert_to_torch(open_source(str(ours)), back)
    for name in ("model", "vocoder"):
        assert_same_tensors(
            SafetensorsFile(golden / f"{name}.safetensors"), SafetensorsFile(back / f"{name}.safetensors")
        )
    assert (back / "config.json").read_bytes() == (golden / "config.json").read_bytes()
    assert json.loads((back / "vocoder_config.json").read_text()) == json.loads(
        (golden / "vocoder_config.json").read_text()
    )


def test_random_shards(random_checkpoint: Path, converted: Path, tmp_path: Path, monkeypatch) -> None:
    assert len(list(random_checkpoint.glob("model-*.safetensors"))) == 2
    for module in (safetensors_io, leaf_store):
        monkeypatch.setattr(module, "BLOCK_BYTES", 5000)
    done = []
    source = open_source(str(converted))
    exports = plan_to_torch(source)
    convert_to_torch(source, tmp_path / "back", exports=exports, shard_bytes=400_000, advance=done.append)
    assert sum(done) == sum(export.nbytes for export in exports.values())
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert_same_tensors(open_weights(random_checkpoint), open_weights(tmp_path / "back"))
    vocoders = [SafetensorsFile(folder / "vocoder.safetensors") for folder in (random_checkpoint, tmp_path / "back")]
    assert_same_tensors(*vocoders)
    for name, text in TOKENIZER.items():
        assert (tmp_path / "back" / name).read_text() == text
    assert (tmp_path / "back" / "config.json").read_bytes() == (random_checkpoint / "config.json").read_bytes()


@pytest.mark.slow
def test_our_checkpoint_is_read_as_any_other(random_checkpoint: Path, converted: Path) -> None:
    cfg, vocoder = other_sizes(), tiny_vocoder()
    assert read_hf(converted / "config.json") == cfg
    assert (converted / "processor" / "tokenizer.json").read_text() == TOKENIZER["tokenizer.json"]
    info = read_branch_info(converted)
    abstract, rules = abstract_branches(cfg, vocoder), branch_rules(cfg, vocoder)
    assert set(info) == set(abstract)
    assert {(line.dtype, line.trained) for line in info.values()} == {("bfloat16", 0)}
    weights = {name: open_weights(random_checkpoint) for name in abstract}
    weights["vocoder"] = SafetensorsFile(random_checkpoint / "vocoder.safetensors")
    loaded = load_branches(str(converted), abstract)
    for name, module in loaded.items():
        values = named_values(module)
        assert info[name].parameters == sum(value.size for value in values.values())
        expected = named_values(load_branch_from_safetensors(weights[name], rules[name], abstract[name]))
        for leaf, value in expected.items():
            np.testing.assert_array_equal(np.asarray(values[leaf]), np.asarray(value), err_msg=leaf)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_a_branch(converted: Path, random_checkpoint: Path) -> None:
    tree = ocp.PyTreeCheckpointer().restore(converted / "params" / "llm")
    weights = open_weights(random_checkpoint)
    query = tree["layers"]["attention"]["q_proj"]["weight"]
    assert query.shape == (2, 128, 6, 32)
    their = weights.read("model.layers.1.self_attn.q_proj.weight")
    assert np.asarray(query[1]).tobytes() == their.T.reshape(128, 6, 32).tobytes()


def test_one_chunk_holds_one_layer(converted: Path) -> None:
    reader = leaf_store.BranchReader(converted / "params" / "flow")
    chunks = reader._arrays["prenet.layers.mlp.fc1.weight"].chunk_layout.read_chunk.shape
    assert chunks == (1, 32, 64)


def test_some_branches_only(random_checkpoint: Path, tmp_path: Path) -> None:
    jobs = plan_to_jax(random_checkpoint, None, ["vision"])
    convert_to_jax(random_checkpoint, tmp_path / "ours", jobs=jobs)
    assert [path.name for path in (tmp_path / "ours" / "params").iterdir()] == ["vision"]
    convert_to_torch(open_source(str(tmp_path / "ours")), tmp_path / "back")
    back, there = open_weights(tmp_path / "back"), open_weights(random_checkpoint)
    assert set(back.infos) == {name for name in there.infos if "visual" in name}
    assert all(back.read(name).tobytes() == there.read(name).tobytes() for name in back.infos)


def test_a_trained_branch_goes_back_with_the_rest_of_its_base(
    random_checkpoint: Path, converted: Path, tmp_path: Path
) -> None:
    """Training saves some branches, in fp32, with a config of its own writing."""
    cfg = other_sizes()
    llm = load_branches(str(converted), abstract_branches(cfg, only=["llm"]))["llm"]
    trained = jax.tree.map(lambda x: (x * 2).astype(np.float32), llm)
    save_branches(tmp_path / "run", {"llm": trained}, cfg, trained={"llm": 7})
    source = open_source(str(tmp_path / "run"), str(converted))
    convert_to_torch(source, tmp_path / "back", exports=plan_to_torch(source, "bfloat16"))
    there, back = open_weights(random_checkpoint), open_weights(tmp_path / "back")
    assert there.infos == back.infos
    for name in there.infos:
        ours = name.startswith(("model.layers", "model.norm", "model.embed_tokens", "lm_head"))
        expected = (
            (there.read(name).astype(np.float32) * 2).astype(there.infos[name].dtype) if ours else there.read(name)
        )
        assert back.read(name).tobytes() == expected.tobytes(), name
    assert (tmp_path / "back" / "tokenizer_config.json").exists()
    # Alone, the branch gives its own tensors, as they are stored.
    convert_to_torch(open_source(f"llm={tmp_path / 'run'}"), tmp_path / "alone")
    alone = open_weights(tmp_path / "alone")
    assert {info.dtype.name for info in alone.infos.values()} == {"float32"}
    save_branches(tmp_path / "other", {"llm": trained}, tiny())
    with pytest.raises(ConfigError, match="describe different models"):
        open_source(str(tmp_path / "other"), str(converted))


def rewrite(folder: Path, target: Path, change: dict) -> None:
    """A copy of the checkpoint as one file, with some tensors changed or (None) gone."""
    target.mkdir(parents=True)
    weights = open_weights(folder)
    values = {name: weights.read(name) for name in weights.infos} | change
    values = {name: value for name, value in values.items() if value is not None}
    infos = {name: TensorInfo(value.shape, value.dtype) for name, value in values.items()}
    write_shards(target, "model.safetensors", infos, 1 << 30, lambda name: [values[name]])
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())


def test_buffers_come_back_as_they_were(random_checkpoint: Path, tmp_path: Path) -> None:
    """One that is absent, one rounded otherwise, one longer: back to the bit. Another table is refused."""
    weights = open_weights(random_checkpoint)
    decoder, flow, encoder = sorted(name for name in weights.infos if name.endswith("positional_embedding"))
    rounded, longer = weights.read(decoder), np.concatenate([weights.read(flow), weights.read(flow)[:2]])
    rounded.view(np.uint16)[3, 5] ^= 1
    rewrite(random_checkpoint, tmp_path / "hf", {encoder: None, decoder: rounded, flow: longer})
    convert_to_jax(tmp_path / "hf", tmp_path / "ours")
    convert_to_torch(open_source(str(tmp_path / "ours")), tmp_path / "back")
    assert_same_tensors(open_weights(tmp_path / "hf"), open_weights(tmp_path / "back"))
    rewrite(random_checkpoint, tmp_path / "bad", {flow: np.zeros_like(longer), encoder: np.zeros((3, 7), np.float32)})
    with pytest.raises(ConfigError, match=f"buffer {encoder} has shape .*; buffer {flow} is not the table"):
        convert_to_jax(tmp_path / "bad", tmp_path / "none")
    assert not (tmp_path / "none").exists()
