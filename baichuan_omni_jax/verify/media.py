"""Checks of the branches around the language model: vision, audio encoder, quantizer, decoder, flow, vocoder."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.kernels.rvq_lookup import rvq_lookup
from baichuan_omni_jax.nn.param import split_as
from baichuan_omni_jax.verify.fixtures import COMPUTE, TOLERANCE, Fixtures, Golden
from baichuan_omni_jax.vision.model import ROWS

# Two codes whose distances differ by less, relatively, are the same to fp32.
NEAR_TIE = 1e-5


def patch_places(grids: np.ndarray, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and column (p, 2) of each patch, and the number of its frame (p,), counted from 1.

    `grids` holds (frames, rows, columns) of each image; patches come in the order that groups `merge` x `merge`
    neighbors, and every temporal slice is a frame of its own.
    """
    places, frames = [np.zeros((0, 2), np.int32)], [np.zeros((0,), np.int32)]
    for height, width in [(h, w) for t, h, w in grids for _ in range(t)]:
        # (rows, columns) -> (row groups, column groups, 2, 2): a projector's four neighbors lie side by side.
        place = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
        place = place.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
        places.append(place.reshape(-1, 2).astype(np.int32))
        frames.append(np.full(height * width, len(frames), np.int32))
    return np.concatenate(places), np.concatenate(frames)


def vision(fixtures: Fixtures, gold: Golden) -> None:
    """Checks tower and projector over all images as one row."""
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
    """Checks the encoder over a padded batch, with the released batch dependence."""
    cfg, mel, frames = fixtures.config.audio, gold.input("mel").transpose(0, 2, 1), gold.input("frames")
    # `padded` computes the released convolutions, which see what stands past a clip's end.
    run = jax.jit(lambda tokenizer, mel, frames: tokenizer.encoder(mel, frames, padded=True))
    gold.compare("hidden_states", run(fixtures.branch("audio_encoder"), mel, frames))
    gold.equal("encoder_length", np.array([cfg.encoder_length(n) for n in frames.tolist()]))
    gold.equal("bridge_length", np.array([cfg.bridge_length(n) for n in frames.tolist()]))


def audio_encoder_single(fixtures: Fixtures, gold: Golden) -> None:
    """Checks clips of one batch, each of which must come out as it does alone: the padding is noise."""
    cfg, clips, tokenizer = fixtures.config.audio, fixtures.golden("audio_encoder"), fixtures.branch("audio_encoder")
    mel, frames = clips.input("mel").transpose(0, 2, 1), clips.input("frames")
    # Noise past each clip's end: with our convolutions a clip's result must not depend on it.
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
    """Checks bridge, quantizer and back: the sum of the codes, and what the audio decoder reads."""
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
    # Back from the reference's own codes, so that a near tie above cannot count twice.
    recovered, embedded = back(tokenizer, fixtures.branch("audio_decoder"), gold.reference("codes")[None])
    gold.compare("recovered", recovered[0])
    gold.compare("decoder_emb", embedded[0])


def rvq(fixtures: Fixtures, gold: Golden) -> None:
    """Checks the residual lookup alone."""
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
    """Returns our codes (n, q), the reference's where both are as near to fp32 rounding, and in how many rows.

    They are where at every level of our row no code is nearer than ours by more than `NEAR_TIE`, and the first code
    that differs is as near as the reference's.
    """
    if ours.shape != reference.shape or len(x) != len(ours):
        return ours, 0
    settled, ties = ours.copy(), 0
    # Only rows that differ are computed again, in fp64.
    for i in np.flatnonzero((ours != reference).any(-1)):
        if _as_near(ours[i], reference[i], x[i].astype(np.float64), codebooks):
            settled[i], ties = reference[i], ties + 1
    return settled, ties


def _as_near(ours: np.ndarray, reference: np.ndarray, residual: np.ndarray, codebooks: Sequence[np.ndarray]) -> bool:
    # Once a level differs, the reference's later codes belong to another residual: ours alone must be nearest.
    same = True
    for code, theirs, codebook in zip(ours, reference, codebooks, strict=True):
        distances = np.linalg.norm(residual - codebook, axis=-1)
        nearest = distances.min() * (1 + NEAR_TIE)
        if distances[code] > nearest or (same and distances[theirs] > nearest):
            return False
        same = same and code == theirs
        residual = residual - codebook[code]
    return True


FLOW_TOLERANCE = 1e-4
# A bit of f0 more or less, summed over thousands of samples, moves the phase of the highest harmonic.
WAVE_TOLERANCE = 2e-3
# What stands in padding of ours: it must not matter.
PADDING = 7.0

_decode = jax.jit(
    lambda decoder, x, lengths, padded: decoder.decode_embedded(x, lengths, padded=padded), static_argnums=3
)


def audio_decoder(fixtures: Fixtures, gold: Golden) -> None:
    """Checks the decoder over a padded batch, with the released batch dependence."""
    lengths = gold.input("bridge_length")
    # The golden holds the clips' valid frames one after the other; ours are padded with what must not matter.
    items = np.split(gold.input("decoder_emb"), np.cumsum(lengths)[:-1])
    out = _decode(fixtures.branch("audio_decoder"), padded_items(items), lengths, True)
    # Past a clip's end the reference's states mean nothing; its mels are zeroed there, as ours are.
    real = np.arange(out.hidden.shape[1]) < np.asarray(out.hidden_lengths)[:, None]
    gold.equal("output_length_before_dconv2", out.hidden_lengths)
    gold.equal("mel_length", out.mel_lengths)
    gold.compare("hidden_states_before_dconv2", np.asarray(out.hidden)[real])
    gold.compare("coarse_mel", out.coarse_mel)
    gold.compare("refined_mel", out.refined_mel)


def audio_decoder_single(fixtures: Fixtures, gold: Golden) -> None:
    """Checks items of one batch, each of which must come out as it does alone."""
    items = [gold.input(f"decoder_emb_{i}") for i in gold.items("decoder_emb")]
    lengths = np.array([len(item) for item in items], np.int32)
    out = _decode(fixtures.branch("audio_decoder"), padded_items(items), lengths, False)
    hidden, coarse, refined = (np.asarray(x) for x in (out.hidden, out.coarse_mel, out.refined_mel))
    for i, (states, frames) in enumerate(zip(out.hidden_lengths.tolist(), out.mel_lengths.tolist(), strict=True)):
        gold.compare(f"hidden_states_before_dconv2_{i}", hidden[i, :states])
        gold.compare(f"coarse_mel_{i}", coarse[i, :frames])
        gold.compare(f"refined_mel_{i}", refined[i, :frames])
        gold.equal(f"mel_length_{i}", np.array([frames]))


def padded_items(items: Sequence[np.ndarray]) -> np.ndarray:
    """Pads items (length, width) to (items, longest, width)."""
    x = np.full((len(items), max(map(len, items)), items[0].shape[-1]), PADDING, np.float32)
    for row, item in zip(x, items, strict=True):
        row[: len(item)] = item
    return x


def flow_matching(fixtures: Fixtures, gold: Golden) -> None:
    """Checks the pre-net, the estimator once, and the whole sampling; mels are last here and in the middle there."""
    lengths, noise = gold.input("lengths"), gold.input("noise").transpose(0, 2, 1)
    time = np.full(len(lengths), gold.input("t"), np.float32)
    real = np.arange(noise.shape[1]) < lengths[:, None]
    # States past the end are replaced by what must not matter; the noise there stays, as in the release.
    hidden = np.where(real[..., None], gold.input("hidden_states"), PADDING).astype(np.float32)

    @jax.jit
    def run(decoder, hidden, lengths, noise, time):
        mu = decoder.prenet(hidden, lengths)
        velocity = decoder.estimator(noise, mu, time, lengths)
        return mu, velocity.swapaxes(1, 2), sample_mel(decoder, hidden, lengths, noise).swapaxes(1, 2)

    mu, velocity, mel = run(fixtures.branch("flow"), hidden, lengths, noise, time)
    gold.equal("prenet_lengths", lengths, "as given: one mel frame a state")
    gold.compare("prenet_out", mu)
    gold.compare("estimator_out", velocity)
    gold.compare("mel", mel, FLOW_TOLERANCE)


_f0 = jax.jit(lambda vocoder, mel, lengths: vocoder.f0_predictor(mel, lengths))
_source = jax.jit(lambda vocoder, f0, phase, noise: vocoder.source(f0, phase, noise))
_filter = jax.jit(lambda vocoder, mel, lengths, source: vocoder.filter(mel, lengths, source))


def vocoder(fixtures: Fixtures, gold: Golden) -> None:
    """Checks F0, source and wave: from the reference's own f0 and source as close as anywhere, and end to end."""
    # The golden of unvoiced sound brings a predictor's weights of its own, so that f0 is below the threshold.
    replaced = {name: gold.input(name) for name in gold.names if name in fixtures.vocoder_weights.infos}
    mel, noise = gold.input("mel").transpose(0, 2, 1), gold.input("sine_noise").transpose(0, 2, 1)
    lengths, phase = np.full(len(mel), mel.shape[1], np.int32), gold.input("phase")[..., 0]
    model = fixtures.vocoder_with(replaced)
    f0 = np.asarray(_f0(model, mel, lengths))
    gold.compare("f0", f0)
    # Everything as host arrays, so that each step is compiled once.
    source = np.asarray(_source(model, gold.reference("f0"), phase, noise))
    wave = _filter(model, mel, lengths, gold.reference("source")[:, 0])
    gold.compare("source", source[:, None], TOLERANCE, "from the reference's f0")
    gold.compare("wav", wave, TOLERANCE, "from the reference's source")
    # End to end: errors of f0 add up in the phase, so the tolerance is wider.
    source = np.asarray(_source(model, f0, phase, noise))
    gold.compare("source", source[:, None], WAVE_TOLERANCE, "from the mel")
    gold.compare("wav", _filter(model, mel, lengths, source), WAVE_TOLERANCE, "from the mel")
