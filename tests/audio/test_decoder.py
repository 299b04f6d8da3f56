"""The audio decoder untrained: lengths, padding, causality, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.decoder import AudioDecoder
from tests.helpers.untrained import AUDIO, COMPUTE, KEY, POST_NET, assert_close, normal, untrained

pytestmark = pytest.mark.usefixtures("exact")
run = jax.jit(lambda decoder, features, lengths: decoder(features, lengths))


@pytest.fixture(scope="module")
def decoder() -> AudioDecoder:
    return untrained(lambda: AudioDecoder(KEY, AUDIO, POST_NET, COMPUTE))


def test_an_item_in_a_batch_equals_the_item_alone(decoder, rng):
    """Whatever is in the padding: normalizations count an item's own frames."""
    features = normal(rng, 3, 6, AUDIO.code_dim)
    batch = run(decoder, features, np.array([6, 3, 0], np.int32))
    alone = run(decoder, features[1:2, :3], np.array([3], np.int32))
    for name in ("hidden", "coarse_mel", "refined_mel"):
        ours, theirs = getattr(batch, name)[1], getattr(alone, name)[0]
        assert_close(ours[: len(theirs)], theirs)
        np.testing.assert_array_equal(ours[len(theirs) :], 0)
    np.testing.assert_array_equal(batch.hidden_lengths, [23, 11, 0])
    np.testing.assert_array_equal(batch.mel_lengths, [28, 13, 0])


def test_its_layers_are_causal(decoder, rng):
    """States depend on no later frame (GroupNorm before them counts the whole item)."""
    x, lengths = normal(rng, 1, 24, AUDIO.d_model), jnp.array([24], jnp.int32)
    later = x.copy()
    later[:, 15:] = -later[:, 15:]
    states = jax.jit(lambda decoder, x: decoder.states(x, lengths))
    one, other = states(decoder, x), states(decoder, later)
    assert_close(one[:, :15], other[:, :15])
    assert np.abs(np.asarray(one - other))[:, 15:].max() > 1e-3


def test_errors(decoder, rng):
    with pytest.raises(ValueError, match=r"expected \(items, frames, 64\)"):
        decoder(jnp.zeros((2, 6, 5)), jnp.array([6, 3], jnp.int32))
