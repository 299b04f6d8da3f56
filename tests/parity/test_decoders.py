"""The branches that make sound against the released computation: fp32, precision `highest`, relative to the largest
value. An item in our batches equals the item alone; the released batch dependence is `padded=True`."""

import functools

import golden_decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import golden_path
from golden_weights import fill, golden_arrays, golden_config

from baichuan_omni_jax.audio.decoder import AudioDecoder
from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.flow.sampler import sample_mel
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.config import read_vocoder_config
from baichuan_omni_jax.vocoder.model import Vocoder

# Seen: audio decoder 5e-7; estimator 2.5e-6, mel after 10 steps 2.1e-6; source and wave of the reference's own pitch
# 1e-6. The pitch itself is as close (4e-7), but its last bit moves the phase: source and wave 1.8e-4.
TOLERANCE = 5e-6
WAVE_TOLERANCE = 1e-3
COMPUTE = Compute(attention_block=64)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _fp32_on_one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


def distance(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@functools.cache
def audio_decoder() -> AudioDecoder:
    cfg = golden_config()
    abstract = jax.eval_shape(lambda: AudioDecoder(KEY, cfg.audio, cfg.post_net, COMPUTE))
    return fill(abstract, golden_decoders.audio_decoder(golden_arrays("model"), cfg))


@functools.cache
def flow_decoder() -> FlowDecoder:
    cfg = golden_config()
    abstract = jax.eval_shape(lambda: FlowDecoder(KEY, cfg.flow, COMPUTE))
    return fill(abstract, golden_decoders.flow(golden_arrays("model"), cfg))


def vocoder(other_weights=None) -> Vocoder:
    cfg = read_vocoder_config(golden_path("omni_a/vocoder_config.json"))
    abstract = jax.eval_shape(lambda: Vocoder(KEY, cfg, COMPUTE))
    weights = golden_arrays("vocoder") | (other_weights or {})
    return fill(abstract, golden_decoders.vocoder(weights, cfg))


def unpacked(packed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Items one after the other -> (items, longest, width), with padding that must not matter."""
    x = np.full((len(lengths), lengths.max(), packed.shape[-1]), 7.0, np.float32)
    for row, part in zip(x, np.split(packed, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(part)] = part
    return x


decode = jax.jit(lambda d, x, lengths, padded: d.decode_embedded(x, lengths, padded=padded), static_argnums=3)


def test_audio_decoder_of_a_padded_batch():
    gold, decoder = golden_arrays("audio_decoder"), audio_decoder()
    lengths = gold["bridge_length"]
    out = decode(decoder, unpacked(gold["decoder_emb"], lengths), lengths, True)
    np.testing.assert_array_equal(out.hidden_lengths, gold["output_length_before_dconv2"])
    np.testing.assert_array_equal(out.mel_lengths, gold["mel_length"])
    real = np.arange(out.hidden.shape[1]) < gold["output_length_before_dconv2"][:, None]
    assert distance(np.asarray(out.hidden)[real], gold["hidden_states_before_dconv2"]) <= TOLERANCE
    assert distance(out.coarse_mel, gold["coarse_mel"]) <= TOLERANCE
    assert distance(out.refined_mel, gold["refined_mel"]) <= TOLERANCE


def test_audio_decoder_in_a_batch_equals_alone():
    gold, decoder = golden_arrays("audio_decoder_single"), audio_decoder()
    items = [gold[f"decoder_emb_{i}"] for i in range(3)]
    lengths = np.array([*map(len, items), 0], np.int32)
    out = decode(decoder, unpacked(np.concatenate(items), lengths), lengths, False)
    for i in range(3):
        np.testing.assert_array_equal(out.mel_lengths[i], gold[f"mel_length_{i}"][0])
        for name, ours in (
            ("hidden_states_before_dconv2", out.hidden),
            ("coarse_mel", out.coarse_mel),
            ("refined_mel", out.refined_mel),
        ):
            theirs = gold[f"{name}_{i}"]
            assert distance(ours[i, : len(theirs)], theirs) <= TOLERANCE, (name, i)
            np.testing.assert_array_equal(ours[i, len(theirs) :], 0)
    assert all(np.isfinite(x).all() for x in out)
    np.testing.assert_array_equal(out.hidden[3], 0)


@pytest.mark.parametrize("name", ["flow_matching", "flow_matching_long"])
def test_flow_matching(name):
    gold, decoder = golden_arrays(name), flow_decoder()
    noise, lengths = gold["noise"].transpose(0, 2, 1), gold["lengths"]
    time = np.full(len(lengths), gold["t"], np.float32)
    real = np.arange(noise.shape[1]) < lengths[:, None]
    hidden = np.where(real[..., None], gold["hidden_states"], 7.0)

    @jax.jit
    def run(decoder, hidden, lengths, noise, time):
        mu = decoder.prenet(hidden, lengths)
        return mu, decoder.estimator(noise, mu, time, lengths), sample_mel(decoder, hidden, lengths, noise)

    mu, velocity, mel = run(decoder, hidden, lengths, noise, time)
    assert distance(mu, gold["prenet_out"]) <= TOLERANCE
    assert distance(velocity, gold["estimator_out"].transpose(0, 2, 1)) <= TOLERANCE
    assert distance(mel, gold["mel"].transpose(0, 2, 1)) <= TOLERANCE
    np.testing.assert_array_equal(np.asarray(mel)[~real], noise[~real])


@pytest.mark.parametrize("name", ["vocoder_io", "vocoder_unvoiced_io"])
def test_vocoder(name):
    gold = golden_arrays(name)
    model = vocoder({key: value for key, value in gold.items() if key.startswith("f0_predictor")})
    mel, noise = gold["mel"].transpose(0, 2, 1), gold["sine_noise"].transpose(0, 2, 1)
    lengths = np.full(len(mel), mel.shape[1], np.int32)

    @jax.jit
    def run(model, mel, lengths, phase, noise):
        f0 = model.f0_predictor(mel, lengths)
        return f0, model.source(f0, phase, noise), model(mel, lengths, phase, noise)

    @jax.jit
    def run_from(model, f0, phase, noise, mel, lengths, source):
        return model.source(f0, phase, noise), model.filter(mel, lengths, source)

    arrays = [jnp.asarray(x) for x in (mel, lengths, gold["phase"][..., 0], noise)]
    f0, source, wave = run(model, *arrays)
    assert distance(f0, gold["f0"]) <= TOLERANCE
    # One bit of the pitch is felt 800 times where the ninth harmonic has made 800 turns.
    assert distance(source, gold["source"][:, 0]) <= WAVE_TOLERANCE
    assert distance(wave, gold["wav"]) <= WAVE_TOLERANCE
    # From the reference's own f0 and source every step is as close as elsewhere.
    source, wave = run_from(model, gold["f0"], *arrays[2:], *arrays[:2], gold["source"][:, 0])
    assert distance(source, gold["source"][:, 0]) <= TOLERANCE
    assert distance(wave, gold["wav"]) <= TOLERANCE
