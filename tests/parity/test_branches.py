"""Every branch against the released computation: fp32, matmul precision `highest`, relative to the largest value."""

import functools

import golden_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_weights import fill, golden_arrays, golden_config

from baichuan_omni_jax.audio.model import AudioTokenizer
from baichuan_omni_jax.config import MeshConfig
from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from baichuan_omni_jax.llm.audio_head import AudioHeadBranch
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import Compute
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vision.model import VisionModel

# Seen: at most 1.1e-6. A wrong epsilon shows at about 3e-6.
TOLERANCE = 2.5e-6
COMPUTE = Compute(attention_block=16)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _fp32_on_one_device():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), jax.default_matmul_precision("highest"):
        yield


@functools.cache
def checkpoint():
    return golden_arrays("model"), golden_config()


@functools.cache
def audio_tokenizer() -> AudioTokenizer:
    weights, cfg = checkpoint()
    abstract = jax.eval_shape(lambda: AudioTokenizer(KEY, cfg.audio, COMPUTE))
    return fill(abstract, golden_weights.audio_tokenizer(weights, cfg))


@functools.cache
def language_model() -> LanguageModel:
    weights, cfg = checkpoint()
    abstract = jax.eval_shape(lambda: LanguageModel(KEY, cfg.llm, COMPUTE))
    return fill(abstract, golden_weights.language_model(weights, cfg))


def distance(ours, reference) -> float:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def grid_of(height: int, width: int, merge: int = 2) -> np.ndarray:
    """(row, column) of each patch of a frame, in the order that groups 2x2 neighbours."""
    place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    place = place.reshape(height // merge, merge, width // merge, merge, 2)
    return place.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def packed_frames(grids: np.ndarray, patches: int) -> tuple[np.ndarray, np.ndarray]:
    """patch_grid and patch_segments of all temporal slices of all images, padded to `patches`."""
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    grid = np.concatenate([grid_of(h, w) for h, w in frames])
    ids = np.concatenate([np.full(h * w, i + 1) for i, (h, w) in enumerate(frames)])
    missing = patches - len(ids)
    return np.pad(grid, ((0, missing), (0, 0))).astype(np.int32), np.pad(ids, (0, missing)).astype(np.int32)


def test_vision():
    weights, cfg = checkpoint()
    gold = golden_arrays("vision")
    abstract = jax.eval_shape(lambda: VisionModel(KEY, cfg.vision, COMPUTE))
    model = fill(abstract, golden_weights.vision(weights, cfg))
    count, padded = len(gold["pixel_values"]), 64
    grid, ids = packed_frames(gold["grid_thw"], padded)
    pixels = np.pad(gold["pixel_values"], ((0, padded - count), (0, 0)), constant_values=3.0)[None]

    @jax.jit
    def run(model, pixels, grid, ids):
        return model(pixels, grid, ids), model.tower(*(jax.reshard(x, _rows(x)) for x in (pixels, grid, ids)))

    tokens, encoded = run(model, pixels, grid[None], ids[None])
    assert distance(encoded[0, :count], gold["encoder_out"]) <= TOLERANCE
    assert distance(tokens[0, : count // 4], gold["bridge_out"]) <= TOLERANCE
    np.testing.assert_array_equal(tokens[0, count // 4 :], 0)


def _rows(x):
    return COMPUTE.rules.spec("batch", "media", *[None] * (x.ndim - 2))


def test_audio_encoder_of_a_padded_batch():
    gold, tokenizer = golden_arrays("audio_encoder"), audio_tokenizer()
    mel = gold["mel"].transpose(0, 2, 1)
    encode = jax.jit(lambda t, mel, lengths: t.encoder(mel, lengths, padded=True))
    states = encode(tokenizer, mel, gold["frames"])
    assert distance(states, gold["hidden_states"]) <= TOLERANCE


def test_audio_clips_in_a_batch_equal_clips_alone():
    batch, alone, tokenizer = golden_arrays("audio_encoder"), golden_arrays("audio_encoder_single"), audio_tokenizer()
    # Two more slots: one unused, one whose padding is noise that must not matter.
    mel = np.concatenate([batch["mel"].transpose(0, 2, 1), np.zeros((1, 100, 32), np.float32)])
    mel[2, batch["frames"][2] :] = 5.0
    lengths = np.append(batch["frames"], 0).astype(np.int32)

    @jax.jit
    def run(tokenizer, mel, lengths):
        return tokenizer.encoder(mel, lengths), tokenizer.features(mel, lengths), tokenizer.encode(mel, lengths)

    states, (features, valid), (codes, _) = run(tokenizer, mel, lengths)
    np.testing.assert_array_equal(np.asarray(valid).sum(1), [*batch["bridge_length"], 0])
    for i, (t, g) in enumerate(zip(batch["encoder_length"], batch["bridge_length"], strict=True)):
        assert distance(states[i, :t], alone[f"hidden_states_{i}"]) <= TOLERANCE
        assert distance(features[i, :g], alone[f"pre_quant_{i}"]) <= TOLERANCE
        np.testing.assert_array_equal(codes[i, :g], alone[f"codes_{i}"])
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(states[3], 0)


def test_bridge_and_quantiser():
    gold, tokenizer = golden_arrays("audio_quantizer"), audio_tokenizer()

    @jax.jit
    def run(tokenizer, states):
        features = tokenizer.bridge(states)
        codes, quantised, _ = tokenizer.quantizer.quantize(features)
        return features, codes, quantised, tokenizer.quantizer.decode(codes)

    states = jax.device_put(gold["hidden_states"], jax.NamedSharding(jax.sharding.get_mesh(), _clips()))
    features, codes, quantised, decoded = (np.asarray(x) for x in run(tokenizer, states))
    valid = np.arange(features.shape[1]) < gold["bridge_length"][:, None]
    assert distance(features[valid], gold["pre_quant"][:, : features.shape[1]][valid]) <= TOLERANCE
    np.testing.assert_array_equal(codes[valid], gold["codes"])
    assert distance(quantised[valid], gold["recovered"]) <= TOLERANCE
    assert distance(decoded[valid], gold["recovered"]) <= TOLERANCE


def _clips():
    return COMPUTE.rules.spec("batch", None, None)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rvq(implementation):
    gold, codebooks = golden_arrays("rvq"), audio_tokenizer().quantizer.codebooks()
    lookup = jax.jit(lambda x, books: rvq_lookup(x, books, implementation=implementation))
    codes, _, norms = lookup(jnp.asarray(gold["x"]), codebooks)
    np.testing.assert_array_equal(codes, gold["codes"])
    recovered = sum(np.asarray(book)[gold["codes"][:, q]] for q, book in enumerate(codebooks))
    assert distance(norms[:, -1], np.linalg.norm(gold["x"] - recovered, axis=-1)) <= TOLERANCE


def test_audio_head():
    weights, cfg = checkpoint()
    gold = golden_arrays("audio_head")
    abstract = jax.eval_shape(
        lambda: AudioHeadBranch(KEY, cfg.audio_head, cfg.audio.codebook_sizes, cfg.llm.hidden_size, COMPUTE)
    )
    branch = fill(abstract, golden_weights.audio_head(weights, cfg))
    logits = jax.jit(lambda m, *x: m(*x))(branch, gold["hidden"][None], gold["codes"][None])
    for q, level in enumerate(logits):
        assert distance(level[0], gold[f"logits_{q}"]) <= TOLERANCE, q


def run_language_model(tokens, positions, ids):
    place = jax.NamedSharding(jax.sharding.get_mesh(), COMPUTE.rules.spec("batch", "length"))
    arrays = [jax.device_put(x.astype(np.int32), place) for x in (tokens, positions, ids)]

    @jax.jit
    def run(model, tokens, positions, ids):
        hidden = model(model.embed(tokens), positions, ids)
        return hidden, model.logits(hidden)

    return run(language_model(), *arrays)


def test_language_model_with_left_padding():
    gold = golden_arrays("llm")
    mask = gold["attention_mask"]
    hidden, logits = run_language_model(gold["input_ids"], gold["position_ids"], mask)
    real = mask == 1
    assert distance(np.asarray(logits)[real], gold["logits"][real]) <= TOLERANCE
    assert distance(hidden[:, -1], gold["last_hidden"]) <= TOLERANCE


def test_packed_documents():
    gold = golden_arrays("packed")
    ids = np.repeat(np.arange(len(gold["document_lengths"])) + 1, gold["document_lengths"])[None]
    _, logits = run_language_model(gold["input_ids"], gold["position_ids"], ids)
    assert distance(logits, gold["logits"]) <= TOLERANCE
