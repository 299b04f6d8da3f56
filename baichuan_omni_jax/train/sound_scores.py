"""Held-out scores of the tasks that train on sound: sums over a batch's clips, and the means made of them."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from baichuan_omni_jax.audio.reconstruction import mel_error_sums
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.flow.sampler import sample_mel
from baichuan_omni_jax.nn.lengths import frames_before, keep
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.tokenizer_model import TokenizerModel, clips_of, mel_targets_of
from baichuan_omni_jax.omni.voice_model import beside
from baichuan_omni_jax.train.state import Arrays, Setup
from baichuan_omni_jax.train.transcript import transcript_entropies

Sums = dict[str, Float[Array, "..."]]
SAMPLING_SEED = 0  # of the noise that a held-out mel is sampled from: the same at every evaluation


def tokenizer_sums(setup: Setup, run: RunConfig) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> sums over the batch's valid frames.

    `mel` (levels + 1,): absolute error of the refined mel from the features as they are, then from the first 1, 2, ...
    levels of their codes; `mel_count` what to divide it by. `used_q` (codes,): how often each code was chosen.
    `distance` and `distance_count`: commitment. `transcript` (2,), `transcript_weight`: cross-entropy from the features
    as they are, and from their codes.
    """
    compute, reads = setup.task.compute, "llm" in run.branches

    def sums_of(parameters, batch):
        model = setup.assemble(parameters, {})
        clips = clips_of(batch, compute)
        features, valid = model.audio_encoder.features(clips.mel, clips.lengths)
        codes, quantised, _ = model.audio_encoder.quantizer.quantize(features)
        target = mel_targets_of(batch, ("scale_0",), compute)[0]
        lengths = valid.sum(-1, dtype=jnp.int32)
        seen = [features, *_first_levels(model, codes)]
        decoded = [model.audio_decoder(x, lengths) for x in seen]
        errors = [mel_error_sums(each.refined_mel, each.mel_lengths, target) for each in decoded]
        sums = {"mel": jnp.stack([error for error, _, _ in errors]), "mel_count": errors[0][2]}
        for q, size in enumerate(setup.task.omni.audio.codebook_sizes):
            sums[f"used_q{q}"] = _counts(codes[..., q], valid, size)
        distance = jnp.where(valid[..., None], (features - quantised).astype(jnp.float32) ** 2, 0)
        sums |= {"distance": distance.sum(), "distance_count": valid.sum(dtype=jnp.float32) * distance.shape[-1]}
        if reads:
            weights = batch["text_weights"]
            read = [(transcript_entropies(model, x, valid, batch, run) * weights).sum() for x in (features, quantised)]
            sums |= {"transcript": jnp.stack(read), "transcript_weight": weights.sum()}
        return sums

    return jax.jit(sums_of)


def tokenizer_means(sums: Mapping[str, np.ndarray], code_rate: float) -> dict[str, float]:
    """Of all levels and with the first ones only `mel_mae`, `mel_mae_q0`, ...; of the features as they are
    `mel_mae_unquantised`; `commitment`; for each level the share of codes used, `codes_used_q*`, and `perplexity_q*`;
    `bits_per_second` by the codes' own frequencies; `loss_transcript` and `loss_transcript_unquantised`.
    """
    mel = sums["mel"] / max(float(sums["mel_count"]), 1.0)
    means = {"mel_mae": mel[-1], "mel_mae_unquantised": mel[0], "bits_per_second": 0.0}
    means |= {f"mel_mae_q{q}": value for q, value in enumerate(mel[1:])}
    means["commitment"] = sums["distance"] / max(float(sums["distance_count"]), 1.0)
    for q in range(len(mel) - 1):
        counts = sums[f"used_q{q}"]
        share = counts[counts > 0] / max(counts.sum(), 1.0)
        entropy = -(share * np.log(share)).sum()
        means |= {f"codes_used_q{q}": (counts > 0).mean(), f"perplexity_q{q}": np.exp(entropy)}
        means["bits_per_second"] += code_rate * entropy / np.log(2)
    if "transcript" in sums:
        unquantised, quantised = sums["transcript"] / max(float(sums["transcript_weight"]), 1.0)
        means |= {"loss_transcript": quantised, "loss_transcript_unquantised": unquantised}
    return {name: float(value) for name, value in means.items()}


def flow_sums(setup: Setup, run: RunConfig) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> summed absolute errors of the pre-net's and the sampled mel, and counts."""
    compute = setup.task.compute

    def sums_of(parameters, batch):
        model = setup.assemble(parameters, {})
        hidden, lengths = model.hidden(clips_of(batch, compute))
        mel, lengths = beside(hidden, lengths, mel_targets_of(batch, ("flow",), compute)[0])
        noise = jax.random.normal(jax.random.key(SAMPLING_SEED), mel.shape)
        made = {"prior": model.flow.prenet(hidden, lengths), "sampled": sample_mel(model.flow, hidden, lengths, noise)}
        sums = {name: jnp.abs(keep(x.astype(jnp.float32) - mel, lengths)).sum() for name, x in made.items()}
        return sums | {"count": frames_before(lengths, mel.shape[1]).sum(dtype=jnp.float32) * mel.shape[-1]}

    return jax.jit(sums_of)


def flow_means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`mel_mae` of the sampled mel, `mel_mae_prior` of the pre-net's."""
    count = max(float(sums["count"]), 1.0)
    return {"mel_mae": float(sums["sampled"]) / count, "mel_mae_prior": float(sums["prior"]) / count}


def _first_levels(model: TokenizerModel, codes) -> list[Float[Array, "c g d"]]:
    """The sum of the chosen codes of the first 1, 2, ... levels."""
    total, sums, spec = 0.0, [], model.compute.rules.spec("batch", None, None)
    for q, table in enumerate(model.audio_encoder.quantizer.codebooks()):
        total = total + table.at[codes[..., q]].get(out_sharding=spec)
        sums.append(total)
    return sums


def _counts(codes, valid, size: int) -> Float[Array, " k"]:
    chosen = (codes[..., None] == jnp.arange(size)) & valid[..., None]
    return chosen.sum((0, 1), dtype=jnp.float32)
