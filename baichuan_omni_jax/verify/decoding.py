"""Checks of what speaks: audio decoder, flow matching, vocoder."""

from collections.abc import Sequence

import jax
import numpy as np

from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.verify.fixtures import Fixtures
from baichuan_omni_jax.verify.golden import TOLERANCE, Golden

FLOW_TOLERANCE = 1e-4
# A bit of f0 more or less, summed over thousands of samples, moves the phase of the highest harmonic.
WAVE_TOLERANCE = 2e-3
# What stands in padding of ours: it must not matter.
PADDING = 7.0

_decode = jax.jit(
    lambda decoder, x, lengths, padded: decoder.decode_embedded(x, lengths, padded=padded), static_argnums=3
)


def audio_decoder(fixtures: Fixtures, gold: Golden) -> None:
    """The decoder over a padded batch, with the released batch dependence."""
    lengths = gold.input("bridge_length")
    items = np.split(gold.input("decoder_emb"), np.cumsum(lengths)[:-1])
    out = _decode(fixtures.branch("audio_decoder"), padded_items(items), lengths, True)
    real = np.arange(out.hidden.shape[1]) < np.asarray(out.hidden_lengths)[:, None]
    gold.equal("output_length_before_dconv2", out.hidden_lengths)
    gold.equal("mel_length", out.mel_lengths)
    gold.compare("hidden_states_before_dconv2", np.asarray(out.hidden)[real])
    gold.compare("coarse_mel", out.coarse_mel)
    gold.compare("refined_mel", out.refined_mel)


def audio_decoder_single(fixtures: Fixtures, gold: Golden) -> None:
    """Items of one batch, each of which must come out as it does alone."""
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
    """Items (length, width) -> (items, longest, width)."""
    x = np.full((len(items), max(map(len, items)), items[0].shape[-1]), PADDING, np.float32)
    for row, item in zip(x, items, strict=True):
        row[: len(item)] = item
    return x


def flow_matching(fixtures: Fixtures, gold: Golden) -> None:
    """Pre-net, the estimator once, and the whole sampling; mels are last here and in the middle there."""
    lengths, noise = gold.input("lengths"), gold.input("noise").transpose(0, 2, 1)
    time = np.full(len(lengths), gold.input("t"), np.float32)
    real = np.arange(noise.shape[1]) < lengths[:, None]
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
    """F0, source and wave: from the reference's own f0 and source as close as anywhere, and end to end."""
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
    source = np.asarray(_source(model, f0, phase, noise))
    gold.compare("source", source[:, None], WAVE_TOLERANCE, "from the mel")
    gold.compare("wav", _filter(model, mel, lengths, source), WAVE_TOLERANCE, "from the mel")
