"""Checks of what sees and hears: vision tower, audio encoder, bridge, quantizer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from baichuan_omni_jax.nn.param import split_as
from baichuan_omni_jax.verify.fixtures import COMPUTE, Fixtures
from baichuan_omni_jax.verify.golden import Golden
from baichuan_omni_jax.vision.model import ROWS

# Two codes whose distances differ by less, relatively, are the same to fp32.
NEAR_TIE = 1e-5


def patch_places(grids: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column (p, 2) of each patch, and the number of its frame (p,), counted from 1.

    `grids` holds (frames, rows, columns) of each image; patches come in the order that groups `merge` x `merge`
    neighbours, and every temporal slice is a frame of its own.
    """
    places, frames = [np.zeros((0, 2), np.int32)], [np.zeros((0,), np.int32)]
    for height, width in [(h, w) for t, h, w in grids for _ in range(t)]:
        place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
        place = place.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
        places.append(place.reshape(-1, 2).astype(np.int32))
        frames.append(np.full(height * width, len(frames), np.int32))
    return np.concatenate(places), np.concatenate(frames)


def vision(fixtures: Fixtures, gold: Golden) -> None:
    """Tower and projector over all images as one row."""
    places, frames = patch_places(gold.input("grid_thw"), fixtures.config.vision.spatial_merge_size)

    @jax.jit
    def run(model, *arrays):
        encoded = model.tower(*(split_as(x, COMPUTE, *ROWS) for x in arrays))
        return encoded, model.projector(encoded)

    model = fixtures.branch("vision")
    encoded, tokens = run(model, gold.input("pixel_values")[None], places[None], frames[None])
    gold.compare("encoder_out", encoded[0])
    gold.compare("bridge_out", tokens[0])


def audio_encoder(fixtures: Fixtures, gold: Golden) -> None:
    """The encoder over a padded batch, with the released batch dependence."""
    cfg, mel, frames = fixtures.config.audio, gold.input("mel").transpose(0, 2, 1), gold.input("frames")
    run = jax.jit(lambda tokenizer, mel, frames: tokenizer.encoder(mel, frames, padded=True))
    gold.compare("hidden_states", run(fixtures.branch("audio_encoder"), mel, frames))
    gold.equal("encoder_length", np.array([cfg.encoder_length(n) for n in frames.tolist()]))
    gold.equal("bridge_length", np.array([cfg.bridge_length(n) for n in frames.tolist()]))


def audio_encoder_single(fixtures: Fixtures, gold: Golden) -> None:
    """Clips of one batch, each of which must come out as it does alone: the padding is noise that must not matter."""
    cfg, clips, tokenizer = fixtures.config.audio, fixtures.golden("audio_encoder"), fixtures.branch("audio_encoder")
    mel, frames = clips.input("mel").transpose(0, 2, 1), clips.input("frames")
    mel = np.where(np.arange(mel.shape[1])[:, None] < frames[:, None, None], mel, 5.0).astype(np.float32)

    @jax.jit
    def run(tokenizer, mel, frames):
        states = tokenizer.encoder(mel, frames)
        features = tokenizer.bridge(states)
        return states, features, tokenizer.quantizer.quantize(features)[0]

    states, features, codes = (np.asarray(x) for x in run(tokenizer, mel, frames))
    for i, count in enumerate(frames.tolist()):
        t, g = cfg.encoder_length(count), cfg.bridge_length(count)
        gold.compare(f"hidden_states_{i}", states[i, :t])
        gold.compare(f"pre_quant_{i}", features[i, :g])
        _codes_equal(fixtures, gold, f"codes_{i}", codes[i, :g], gold.reference(f"pre_quant_{i}"))


def audio_quantizer(fixtures: Fixtures, gold: Golden) -> None:
    """Bridge, quantizer and back: the sum of the codes, and what the audio decoder reads."""
    states, lengths = gold.input("hidden_states"), gold.input("bridge_length")
    # The released code fills the last group of four up with zeros; only whole groups are valid.
    states = np.pad(states, ((0, 0), (0, -states.shape[1] % fixtures.config.audio.avg_pooler), (0, 0)))
    valid = np.arange(gold.reference("pre_quant").shape[1]) < lengths[:, None]

    @jax.jit
    def run(tokenizer, states):
        features = tokenizer.bridge(split_as(states, COMPUTE, "batch"))
        return features, tokenizer.quantizer.quantize(features)[0]

    @jax.jit
    def back(tokenizer, decoder, codes):
        recovered = tokenizer.quantizer.decode(codes)
        return recovered, decoder.proj_decoder(recovered)

    tokenizer = fixtures.branch("audio_encoder")
    features, codes = (np.asarray(x) for x in run(tokenizer, states))
    gold.compare("pre_quant", features)
    _codes_equal(fixtures, gold, "codes", codes[valid], gold.reference("pre_quant")[valid])
    recovered, embedded = back(tokenizer, fixtures.branch("audio_decoder"), gold.reference("codes")[None])
    gold.compare("recovered", recovered[0])
    gold.compare("decoder_emb", embedded[0])


def rvq(fixtures: Fixtures, gold: Golden) -> None:
    """The residual lookup alone."""
    x, codebooks = gold.input("x"), fixtures.branch("audio_encoder").quantizer.codebooks()
    codes, _, _ = jax.jit(rvq_lookup)(jnp.asarray(x), codebooks)
    _codes_equal(fixtures, gold, "codes", np.asarray(codes), x)


def _codes_equal(fixtures: Fixtures, gold: Golden, name: str, ours: np.ndarray, x: np.ndarray) -> None:
    codebooks = [np.asarray(book) for book in fixtures.branch("audio_encoder").quantizer.codebooks()]
    settled, ties = settle_ties(ours, gold.reference(name), x, codebooks)
    gold.equal(name, settled, f"{ties} near ties" if ties else "")


def settle_ties(
    ours: np.ndarray, reference: np.ndarray, x: np.ndarray, codebooks: Sequence[np.ndarray]
) -> tuple[np.ndarray, int]:
    """Our codes (n, q) with the reference's where the two are equal to fp32 rounding, and how many rows that are.

    They are where at every level of our row no code is nearer than ours by more than `NEAR_TIE`, and the first code
    that differs is as near as the reference's.
    """
    if ours.shape != reference.shape or len(x) != len(ours):
        return ours, 0
    settled, ties = ours.copy(), 0
    for i in np.flatnonzero((ours != reference).any(-1)):
        if _as_near(ours[i], reference[i], x[i].astype(np.float64), codebooks):
            settled[i], ties = reference[i], ties + 1
    return settled, ties


def _as_near(ours: np.ndarray, reference: np.ndarray, residual: np.ndarray, codebooks: Sequence[np.ndarray]) -> bool:
    same = True
    for code, theirs, codebook in zip(ours, reference, codebooks, strict=True):
        distances = np.linalg.norm(residual - codebook, axis=-1)
        nearest = distances.min() * (1 + NEAR_TIE)
        if distances[code] > nearest or (same and distances[theirs] > nearest):
            return False
        same = same and code == theirs
        residual = residual - codebook[code]
    return True
