"""Audio embeddings that begin as what the transcripts' reader made of each code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.config import ConfigError, tiny
from baichuan_omni_jax.nn.param import ComputePolicy, named_values
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.transcript_reader import TABLES, read_audio_embeddings, usual_norm

CFG = tiny()
COMPUTE = ComputePolicy(dtype=jnp.dtype("float32"), rules=ShardingRules.unsplit())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tokenizer's checkpoint, and its two branches."""
    names = ("audio_encoder", "transcript_adapter")
    keys = jax.random.split(jax.random.key(3))
    branches = {name: BRANCHES[name].build(key, CFG, COMPUTE) for name, key in zip(names, keys, strict=True)}
    # A norm's scale of ones would hide that it is forgotten.
    adapter = branches["transcript_adapter"]
    adapter.norm.scale[...] = jnp.linspace(0.5, 1.5, CFG.audio.code_dim)
    folder = tmp_path_factory.mktemp("tokenizer") / "checkpoint"
    save_branches(folder, branches, CFG)
    return folder, branches


def drawn():
    head = BRANCHES["audio_head"].build(jax.random.key(5), CFG, COMPUTE)
    return {f"audio_head.{name}": value for name, value in named_values(head).items()}


def test_the_sum_of_rows_is_what_the_adapter_makes_of_the_sum_of_codes(run):
    folder, branches = run
    before = drawn()
    tables = read_audio_embeddings(str(folder), CFG, COMPUTE, None, before)
    assert sorted(tables) == sorted(name for name in before if name.startswith(TABLES))

    sizes, rng = CFG.audio.codebook_sizes, np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 50) for size in sizes], -1)[None]
    quantizer, adapter = branches["audio_encoder"].quantizer, branches["transcript_adapter"]
    features = quantizer.decode(jnp.asarray(codes, jnp.int32))
    rows = sum(np.asarray(tables[f"{TABLES}{q}"])[codes[..., q]] for q in range(len(sizes)))

    # The norm divides by the root mean square of these features, the tables by the usual one: exact but for that.
    levels = quantizer.levels
    usual = usual_norm([level.embed[...] for level in levels], [level.cluster_size[...] for level in levels])
    own = np.sqrt(np.mean(np.square(np.asarray(features)), -1, keepdims=True))
    np.testing.assert_allclose(rows * float(usual) / own, np.asarray(adapter(features)), rtol=1e-4, atol=1e-5)
    # Random codes of a random tokenizer are as usual as any.
    assert 0.8 < float(usual) / float(np.sqrt(np.mean(np.square(np.asarray(features))))) < 1.25


def test_the_row_that_ends_speech_stays_as_it_was_drawn(run):
    before = drawn()
    tables = read_audio_embeddings(str(run[0]), CFG, COMPUTE, None, before)
    for name, table in tables.items():
        np.testing.assert_array_equal(table[-1], before[name][-1])
        assert not np.array_equal(table[0], before[name][0])


def test_what_cannot_be_read_is_refused_by_name(run, tmp_path):
    with pytest.raises(ConfigError, match=r"audio_embeddings_from needs the branch audio_head"):
        read_audio_embeddings(str(run[0]), CFG, COMPUTE, None, {})
    save_branches(tmp_path / "half", {"audio_encoder": run[1]["audio_encoder"]}, CFG)
    with pytest.raises(ConfigError, match="transcript_adapter"):
        read_audio_embeddings(str(tmp_path / "half"), CFG, COMPUTE, None, drawn())
