"""Audio decoder, flow matching and vocoder untrained: an item in a batch equals the item alone; what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.flow.sampler import cosine_times, sample_mel
from baichuan_omni_jax.flow.unet import chunk_positions, time_features
from baichuan_omni_jax.nn.conv import overlap_add
from baichuan_omni_jax.nn.lengths import resize_nearest
from baichuan_omni_jax.nn.param import ComputePolicy, named_variables, with_values
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.config import (
    VocoderConfig,
    read_vocoder_config,
    tiny_vocoder,
    vocoder_from_json,
    vocoder_to_json,
)
from baichuan_omni_jax.vocoder.model import Vocoder
from baichuan_omni_jax.vocoder.source import accumulated_turns, divided
from baichuan_omni_jax.vocoder.stft import istft, stft

CFG, COMPUTE, KEY = tiny(), ComputePolicy(attention_block=64), jax.random.key(0)
WHOLE = COMPUTE.rules.spec(None, None, None)
# Few layers of each kind: compiling is what these tests wait for.
FLOW = dataclasses.replace(CFG.flow, num_mid_blocks=1, n_blocks=1, prenet_layers=1)
VOCODER = VocoderConfig(
    in_channels=20,
    base_channels=16,
    upsample_rates=(3, 2),
    upsample_kernel_sizes=(7, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
    source_resblock_kernel_sizes=(3, 5),
    source_resblock_dilation_sizes=((1,), (3,)),
    f0_cond_channels=8,
)


@pytest.fixture(autouse=True)
def _fp32_on_one_device():
    """Each test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


def close(ours, theirs) -> bool:
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= 1e-5 * np.abs(np.asarray(theirs)).max()


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def untrained(make):
    """The module with random weights, drawn by numpy: no program to compile."""
    abstract = jax.eval_shape(make)
    ones = ("scale", "alpha", "weight_g")
    return with_values(
        abstract,
        {
            name: jnp.ones(v.shape) if name.endswith(ones) else jnp.asarray(0.2 * normal(*v.shape))
            for name, v in named_variables(abstract).items()
        },
    )


@pytest.mark.slow
def test_decoder_item_in_a_batch_equals_alone():
    decoder = untrained(lambda: AudioDecoder(KEY, CFG.audio, CFG.post_net, COMPUTE))
    codes, run = normal(3, 6, CFG.audio.code_dim), jax.jit(lambda d, x, n: d(x, n))
    batch = run(decoder, codes, np.array([6, 3, 0], np.int32))
    alone = run(decoder, codes[1:2, :3], np.array([3], np.int32))
    for name in ("hidden", "coarse_mel", "refined_mel"):
        ours, theirs = getattr(batch, name)[1], getattr(alone, name)[0]
        assert close(ours[: len(theirs)], theirs), name
        np.testing.assert_array_equal(ours[len(theirs) :], 0)
    np.testing.assert_array_equal(batch.hidden_lengths, [23, 11, 0])
    np.testing.assert_array_equal(batch.mel_lengths, [28, 13, 0])
    with pytest.raises(ValueError, match=r"expected \(items, frames, 256\)"):
        decoder(jnp.asarray(codes[..., :5]), jnp.array([6, 3, 0], jnp.int32))


@pytest.mark.slow
def test_flow_item_in_a_batch_equals_alone():
    decoder = untrained(lambda: FlowDecoder(KEY, FLOW, COMPUTE))
    hidden, noise = normal(2, 130, CFG.flow.prenet_in_dim), normal(2, 130, CFG.flow.in_channels)

    @jax.jit
    def run(decoder, hidden, lengths, noise):
        return decoder.prenet(hidden, lengths), sample_mel(decoder, hidden, lengths, noise, steps=2)

    mu, mel = run(decoder, hidden, np.array([130, 105], np.int32), noise)
    mu_alone, mel_alone = run(decoder, hidden[1:, :105], np.array([105], np.int32), noise[1:, :105])
    assert close(mu[1, :105], mu_alone[0])
    assert close(mel[1, :105], mel_alone[0])
    np.testing.assert_array_equal(mel[1, 105:], noise[1, 105:])
    with pytest.raises(ValueError, match=r"expected \(items, frames, 64\)"):
        decoder.prenet(jnp.asarray(hidden[..., :5]), jnp.array([1, 1], jnp.int32))


@pytest.mark.slow
def test_vocoder_item_in_a_batch_equals_alone():
    cfg, hop = VOCODER, VOCODER.hop_length
    vocoder = untrained(lambda: Vocoder(KEY, cfg, COMPUTE))
    # A bias that makes it speak: untrained pitch is below the threshold of voicing.
    vocoder.f0_predictor.classifier.bias[...] = jnp.full((1,), 150.0)
    # Soft: the untrained body else clips nearly every sample, and what is just below swings with the last bit.
    vocoder.conv_post.weight_g[...] = 0.1 * vocoder.conv_post.weight_g[...]
    mel, phase, noise = normal(3, 9, 20), normal(3, 9), normal(3, 9 * hop, 9)
    run = jax.jit(lambda v, *inputs: v(*inputs))
    wave = run(vocoder, mel, np.array([9, 5, 0], np.int32), phase, noise)
    alone = run(vocoder, mel[1:2, :5], np.array([5], np.int32), phase[1:2], noise[1:2, : 5 * hop])
    assert close(wave[1, : 5 * hop], alone[0])
    np.testing.assert_array_equal(wave[1, 5 * hop :], 0)
    assert np.isfinite(wave).all()
    assert np.abs(wave).max() <= cfg.audio_limit
    with pytest.raises(ValueError, match="sine_noise"):
        vocoder(jnp.asarray(mel), jnp.array([9, 5, 0], jnp.int32), jnp.asarray(phase), jnp.asarray(noise[:, 1:]))


@pytest.mark.slow
def test_bfloat16_traces_and_differentiates():
    compute = ComputePolicy(dtype=jnp.dtype("bfloat16"))
    decoder = jax.eval_shape(lambda: AudioDecoder(KEY, CFG.audio, CFG.post_net, compute))
    flow = jax.eval_shape(lambda: FlowDecoder(KEY, FLOW, compute))
    vocoder = jax.eval_shape(lambda: Vocoder(KEY, VOCODER, compute))
    lengths = jnp.array([3, 2], jnp.int32)

    def loss(models, x):
        decoder, flow, vocoder = models
        audio = decoder(x, lengths)
        assert audio.hidden.dtype == audio.refined_mel.dtype == jnp.bfloat16
        mel = sample_mel(flow, audio.hidden, audio.hidden_lengths, jnp.zeros((2, 11, 20)))
        wave = vocoder(mel, audio.hidden_lengths, jnp.zeros((2, 9)), jnp.zeros((2, 11 * VOCODER.hop_length, 9)))
        assert mel.dtype == wave.dtype == jnp.float32
        return wave.sum() + audio.refined_mel.astype(jnp.float32).sum()

    gradient = jax.eval_shape(jax.grad(loss), (decoder, flow, vocoder), jnp.zeros((2, 3, 256)))
    assert gradient[1].estimator.mid.resnet.time_proj.weight.shape == (1, 512, 128)


def test_unsupported_variants_are_refused():
    for change, message in (
        ({"channels": (32, 64)}, "flow.channels .* only one resolution"),
        ({"prenet_out_dim": 24}, "flow.prenet_out_dim 24 must equal flow.in_channels 20"),
    ):
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(lambda: FlowDecoder(KEY, dataclasses.replace(CFG.flow, **change), COMPUTE))  # noqa: B023


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spk_embed": 3}, "spk_embed is not a known field"),
        ({"lrelu_slope": None}, "lrelu_slope = None: expected a number above 0"),
        ({"upsample_rates": [8, 5]}, "upsample_kernel_sizes has 3 entries, upsample_rates 2"),
        ({"upsample_kernel_sizes": [16, 11, 8]}, "upsample_kernel_sizes 8 for rate 3"),
        ({"resblock_dilation_sizes": [1, 3, 5]}, "resblock_dilation_sizes .* expected lists of whole numbers"),
        ({"base_channels": 12}, "base_channels 12 cannot be halved 3 times"),
        ({"istft_params": {"n_fft": 16}}, "istft_params.hop_len is missing"),
        ({"istft_params": {"n_fft": 16, "hop_len": 5}}, "multiple of hop_len 5"),
    ],
)
def test_vocoder_config_is_read_strictly(tmp_path, change, message):
    path = tmp_path / "vocoder_config.json"
    path.write_text(json.dumps(vocoder_to_json(VocoderConfig()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        read_vocoder_config(path)
    assert str(path) in str(error.value)


def test_vocoder_config_round_trip():
    for config in (VocoderConfig(), tiny_vocoder()):
        assert vocoder_from_json(json.loads(json.dumps(vocoder_to_json(config)))) == config
    assert (VocoderConfig().hop_length, VocoderConfig().source_strides) == (480, (15, 3, 1))


def test_turns_are_summed_as_in_double_precision():
    """A minute of speech: the whole part reaches 10^5, of which fp32 sums would lose the fraction."""
    f0 = RNG.uniform(80, 400, (1, 3000, 1)).astype(np.float32)
    rates = (f0 * np.array([1, 9], np.float32) / np.float32(24000)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda f: divided(f * jnp.array([1.0, 9.0]), 24000))(f0), rates)
    turns = jax.jit(lambda r: accumulated_turns(r, 480))(rates)
    exact = np.repeat(rates, 480, 1).astype(np.float64).cumsum(1)
    wrong = np.asarray(turns) != exact.astype(np.float32) % 1
    assert wrong.mean() < 1e-4


def test_stft_ends_where_the_item_ends():
    x, lengths = normal(2, 40), jnp.array([40, 24], jnp.int32)
    sizes = {"n_fft": 16, "hop": 4, "spec": WHOLE}
    spectrum = stft(jnp.asarray(x), lengths, **sizes)
    padded = np.pad(x[1, :24], 8, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(16) / 16)
    frames = np.stack([np.fft.rfft(padded[i : i + 16] * hann) for i in range(0, 25, 4)])
    np.testing.assert_allclose(spectrum[1, :7], np.concatenate([frames.real, frames.imag], 1), atol=1e-5)
    np.testing.assert_array_equal(spectrum[1, 7:], 0)
    back = istft(spectrum[..., :9], spectrum[..., 9:], lengths // 4 + 1, **sizes)
    np.testing.assert_allclose(back[0], x[0], atol=1e-5)
    np.testing.assert_allclose(back[1, :24], x[1, :24], atol=1e-5)


def test_overlap_add_and_resize():
    pieces = normal(1, 4, 7, 2)
    expected = np.zeros((1, 3 * 3 + 7, 2), np.float32)
    for i in range(4):
        expected[:, 3 * i : 3 * i + 7] += pieces[:, i]
    np.testing.assert_allclose(overlap_add(jnp.asarray(pieces), 3, WHOLE), expected, atol=1e-6)
    x = jnp.arange(8.0).reshape(1, 8, 1).repeat(2, 0)
    resized = resize_nearest(x, jnp.array([4, 8], jnp.int32), jnp.array([3, 5], jnp.int32), 5)
    np.testing.assert_array_equal(resized[..., 0], [[0, 1, 2, 3, 3], [0, 1, 3, 4, 6]])


def test_times_and_chunks():
    np.testing.assert_allclose(cosine_times(2), [0, 1 - np.sqrt(0.5), 1], atol=1e-6)
    np.testing.assert_allclose(
        time_features(jnp.array([0.002]), 4)[0], [np.sin(2), np.sin(2e-4), np.cos(2), np.cos(2e-4)], atol=1e-6
    )
    np.testing.assert_array_equal(chunk_positions(201)[np.array([0, 99, 100, 200])], [0, 0, 1, 2])
