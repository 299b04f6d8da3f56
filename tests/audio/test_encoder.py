"""The audio encoder untrained: lengths, unused slots, padding, and codes that are worth predicting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.encoder import AudioEncoderBranch, sinusoids
from baichuan_omni_jax.config import tiny
from baichuan_omni_jax.nn.param import ComputePolicy, initialize
from tests.helpers.untrained import AUDIO, COMPUTE, KEY, assert_close, normal, untrained

CFG = tiny().audio


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Compiling is nearly all of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def tokenizer() -> AudioEncoderBranch:
    return initialize(AudioEncoderBranch, jax.random.key(0), CFG, ComputePolicy(attention_block=64))


def speech_like(clips: int, frames: int) -> np.ndarray:
    """Mel like log energies: a few bands that come and go, around the mean and spread of speech."""
    rng = np.random.default_rng(0)
    bands = np.exp(-0.5 * ((np.arange(CFG.num_mel_bins) - rng.uniform(0, 32, (clips, 6, 1))) / 3.0) ** 2)
    when = np.sin(np.arange(frames) * rng.uniform(0.02, 0.3, (clips, 6, 1)) + rng.uniform(0, 6, (clips, 6, 1)))
    return (np.einsum("mbf,mbt->mtf", bands, when) * 0.7 + 0.1).astype(np.float32)


encode = jax.jit(lambda tokenizer, *inputs: tokenizer.encode(*inputs))


@pytest.mark.slow
def test_lengths_and_unused_slots():
    lengths = np.array([240, 100, 99, 8, 7, 1, 0, 0], np.int32)
    codes, valid = encode(tokenizer(), speech_like(8, 240), lengths)
    assert codes.shape == (8, 30, 8)
    np.testing.assert_array_equal(np.asarray(valid).sum(1), [CFG.bridge_length(int(n)) for n in lengths])
    np.testing.assert_array_equal(np.asarray(codes)[~np.asarray(valid)], 0)
    assert (np.asarray(codes) < np.array(CFG.codebook_sizes)).all()


def test_untrained_codes_are_diverse():
    """At each level at least a fifth of the codes is in effective use (the exponential of the entropy)."""
    codes, valid = encode(tokenizer(), speech_like(8, 240), np.full(8, 240, np.int32))
    codes = np.asarray(codes)[np.asarray(valid)]
    for q, size in enumerate(CFG.codebook_sizes):
        share = np.bincount(codes[:, q], minlength=size) / len(codes)
        share = share[share > 0]
        assert np.exp(-(share * np.log(share)).sum()) > size / 5, q


def test_bfloat16_traces_and_differentiates():
    """Types only; values and gradients are compared across meshes and with the goldens."""
    compute = ComputePolicy(dtype=jnp.dtype("bfloat16"))
    abstract = jax.eval_shape(lambda: AudioEncoderBranch(jax.random.key(0), CFG, compute))
    mel, lengths = jnp.asarray(speech_like(2, 64)), jnp.array([64, 20], jnp.int32)

    def loss(model):
        features, valid = model.features(mel, lengths)
        assert features.dtype == jnp.bfloat16
        codes, quantized, _ = model.quantizer.quantize(features)
        assert (codes.dtype, quantized.dtype) == (jnp.int32, jnp.bfloat16)
        return jnp.where(valid[..., None], (features - quantized).astype(jnp.float32) ** 2, 0).mean()

    gradient = jax.eval_shape(jax.grad(loss), abstract)
    assert gradient.encoder.conv1.linear.weight.dtype == jnp.float32


def test_sinusoids():
    np.testing.assert_allclose(
        sinusoids(3, 4)[2], [np.sin(2), np.sin(0.0002), np.cos(2), np.cos(0.0002)], rtol=1e-6, atol=1e-7
    )


def test_errors():
    with pytest.raises(ValueError, match=r"expected \(clips, frames, 32\) and \(clips,\)"):
        tokenizer().encode(jnp.zeros((2, 10, 31)), jnp.zeros(2, jnp.int32))


@pytest.mark.usefixtures("exact")
def test_a_clip_in_a_batch_equals_the_clip_alone(rng):
    """Of an odd number of frames too, whose last one the strided convolution reads beside the padding."""
    small = untrained(lambda: AudioEncoderBranch(KEY, AUDIO, COMPUTE))
    features = jax.jit(lambda branch, mel, lengths: branch.features(mel, lengths)[0])
    mel = normal(rng, 3, 64, AUDIO.num_mel_bins)
    batch = features(small, mel, np.array([64, 41, 0], np.int32))
    alone = features(small, mel[1:2, :41], np.array([41], np.int32))
    assert AUDIO.bridge_length(41) == alone.shape[1] == 5
    assert_close(batch[1, :5], alone[0])
    other = mel.copy()
    other[1, 41:], other[0] = 9.0, -other[0]
    np.testing.assert_array_equal(features(small, other, np.array([64, 41, 0], np.int32))[1, :5], batch[1, :5])
