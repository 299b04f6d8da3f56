"""The depth transformer with a cache against whole depth sequences; a level sees the codes below it alone."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch, stored_part
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from tests.helpers.decoding import distance
from tests.helpers.micro import one_device

CFG = replace(tiny().audio_head, num_layers=2)
SIZES, WIDTH, ROWS = tiny().audio.codebook_sizes, tiny().llm.hidden_size, 3


@pytest.fixture(scope="module", autouse=True)
def _mesh():
    with jax.set_mesh(one_device()), jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def branch(_mesh):
    """Random weights, biases among them, made on the host."""
    build = lambda: AudioHeadBranch(jax.random.key(0), CFG, SIZES, WIDTH, ComputePolicy(remat="none"))  # noqa: E731
    abstract, rng = jax.eval_shape(build), np.random.default_rng(1)
    values = {
        name: jax.device_put(np.float32(0.1) * rng.standard_normal(x.shape, np.float32) + name.endswith("scale"))
        for name, x in named_values(abstract).items()
    }
    return with_values(abstract, values)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return hidden, rng.integers(0, SIZES, (ROWS, len(SIZES))).astype(np.int32)


@pytest.fixture(scope="module")
def whole(branch):
    run = jax.jit(lambda branch, hidden, codes: branch(hidden[:, None], codes[:, None]))
    return lambda *x: [np.asarray(level)[:, 0] for level in run(branch, *x)]


def test_the_depth_cache_gives_the_logits_of_the_whole_depth_sequence(branch, inputs, whole):
    """To 1e-4 of the largest."""

    @jax.jit
    def cached(branch, hidden, codes):
        branch = branch.to_decode_layout()
        x, total, caches, levels = hidden, 0.0, branch.empty_caches(ROWS), []
        for q in range(len(SIZES)):
            logits, caches = branch.level_logits(q, x, caches)
            x = total = total + branch.embedding.level(q, codes[:, q : q + 1])[:, 0]
            levels.append(logits)
        return levels

    levels, expected = cached(branch, *inputs), whole(*inputs)
    for q, size in enumerate(SIZES):
        count = size + (q == 0)
        assert distance(np.asarray(levels[q])[:, :count], expected[q][:, :count]) < 1e-4
        # Nothing else may be chosen, the extra index of levels above 0 least of all.
        assert (np.asarray(levels[q])[:, count:] == -np.inf).all()


def test_frames_are_decoded_greedily_as_the_whole_sequence_would_choose(branch, inputs, whole):
    hidden, _ = inputs
    decode = jax.jit(lambda branch, x: branch.to_decode_layout().decode_frame(x, lambda _, logits: logits.argmax(-1)))
    codes = np.asarray(decode(branch, hidden))
    for q, logits in enumerate(whole(hidden, codes)):
        np.testing.assert_array_equal(logits[:, : SIZES[q] + (q == 0)].argmax(-1), codes[:, q])


@pytest.mark.parametrize("level", [0, 3, len(SIZES) - 1])
def test_causality_a_level_sees_the_codes_below_it_alone(inputs, whole, level):
    hidden, codes = inputs
    changed = codes.copy()
    changed[:, level:] = (changed[:, level:] + 1) % np.array(SIZES[level:])
    before, after = whole(hidden, codes), whole(hidden, changed)
    for q in range(level + 1):
        np.testing.assert_array_equal(after[q], before[q])
    assert all(distance(after[q], before[q]) > 1e-3 for q in range(level + 1, len(SIZES)))


def test_the_decode_layout_is_each_stored_parameter_bit_for_bit(branch):
    stored = {name: np.asarray(x) for name, x in named_values(branch).items()}
    decoded = named_values(jax.jit(AudioHeadBranch.to_decode_layout)(branch))
    counted = dict.fromkeys(stored, 0)
    for name, value in decoded.items():
        source, part = stored_part(name)
        np.testing.assert_array_equal(np.asarray(value), stored[source][part], err_msg=name)
        counted[source] += np.asarray(value).size
    # All of every parameter is there, but for biases that no one reads.
    assert {name for name, size in counted.items() if size != stored[name].size} == {
        "head.layers.unused_bias1",
        "head.layers.unused_bias2",
    }
