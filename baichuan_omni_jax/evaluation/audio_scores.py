"""Held-out scores of the tasks that train on sound: sums over a batch's clips, and the means made of them."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from baichuan_omni_jax.audio.decoder import AudioDecoder, DecodedAudio
from baichuan_omni_jax.audio.encoder import AudioEncoderBranch
from baichuan_omni_jax.audio.mel_training import SAME_RATE, MelTarget, mel_error_sums
from baichuan_omni_jax.config import RunConfig
from baichuan_omni_jax.config.mel_targets import reconstruction_ratios
from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.nn.conv import length_mask, mask_padding
from baichuan_omni_jax.omni.audio_tokenizer_model import Clips, clips_of, mel_targets_of
from baichuan_omni_jax.omni.batch import Batch
from baichuan_omni_jax.omni.flow_matching_model import match_lengths
from baichuan_omni_jax.train.state import Arrays, StepSpec
from baichuan_omni_jax.train.transcript import transcript_entropies

Sums = dict[str, Float[Array, "..."]]
SAMPLING_SEED = 0  # of the noise that a held-out mel is sampled from: the same at every evaluation


def tokenizer_sums(spec: StepSpec, run: RunConfig) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> sums over the batch's valid frames.

    Those of `code_sums`; `transcript` (2,), `transcript_weight`: cross-entropy from the features as they are, and from
    their codes.
    """
    compute, reads = spec.task.compute, "llm" in run.branches
    ratio = reconstruction_ratios(run.tokenizer.mel_scales, spec.task.omni.post_net)[0]

    def sums_of(parameters, batch):
        model, batch = spec.assemble(parameters, {}), spec.task.weigh(batch)
        target = mel_targets_of(batch, ("scale_0",), compute)[0]
        sums, made = code_sums(model.audio_encoder, model.audio_decoder, clips_of(batch, compute), target, ratio)
        if reads:
            weights, seen = batch["text_weights"], (made.features, made.quantized)
            read = [(transcript_entropies(model, x, made.valid, batch, run) * weights).sum() for x in seen]
            sums |= {"transcript": jnp.stack(read), "transcript_weight": weights.sum()}
        return sums

    return jax.jit(sums_of)


class ThroughCodes(NamedTuple):
    """Clips on their way through their codes: features, which of them are valid, codes, their sum, the decoded mel."""

    features: Float[Array, "c g f"]
    valid: Bool[Array, "c g"]
    codes: Int32[Array, "c g q"]
    quantized: Float[Array, "c g f"]
    decoded: DecodedAudio


def code_sums(
    encoder: AudioEncoderBranch, decoder: AudioDecoder, clips: Clips, target: MelTarget, ratio: Fraction = SAME_RATE
) -> tuple[Sums, ThroughCodes]:
    """Sums over the clips' valid frames, and what they are of. `ratio`: decoded frames for each of the target's.

    `mel` (levels + 1,): absolute error of the refined mel from the features as they are, then from the first 1, 2, ...
    levels of their codes; `mel_count` what to divide it by. `used_q` (codes,): how often each code was chosen.
    `distance` and `distance_count`: commitment.
    """
    features, valid = encoder.features(clips.mel, clips.lengths)
    codes, quantized, _ = encoder.quantizer.quantize(features)
    lengths = valid.sum(-1, dtype=jnp.int32)
    decoded = [decoder(x, lengths) for x in (features, *_first_levels(encoder, codes))]
    errors = [mel_error_sums(each.refined_mel, each.mel_lengths, target, ratio) for each in decoded]
    sums = {"mel": jnp.stack([error for error, _, _ in errors]), "mel_count": errors[0][2]}
    for q, size in enumerate(encoder.cfg.codebook_sizes):
        sums[f"used_q{q}"] = _counts(codes[..., q], valid, size)
    distance = jnp.where(valid[..., None], (features - quantized).astype(jnp.float32) ** 2, 0)
    sums |= {"distance": distance.sum(), "distance_count": valid.sum(dtype=jnp.float32) * distance.shape[-1]}
    return sums, ThroughCodes(features, valid, codes, quantized, decoded[-1])


def tokenizer_means(sums: Mapping[str, np.ndarray], code_rate: float) -> dict[str, float]:
    """Of all levels and with the first ones only `mel_mae`, `mel_mae_q0`, ...; of the features as they are
    `mel_mae_unquantized`; `commitment`; for each level the share of codes used, `codes_used_q*`, and `perplexity_q*`;
    `bits_per_second` by the codes' own frequencies; `loss_transcript` and `loss_transcript_unquantized`.
    """
    mel = sums["mel"] / max(float(sums["mel_count"]), 1.0)
    means = {"mel_mae": mel[-1], "mel_mae_unquantized": mel[0], "bits_per_second": 0.0}
    means |= {f"mel_mae_q{q}": value for q, value in enumerate(mel[1:])}
    means["commitment"] = sums["distance"] / max(float(sums["distance_count"]), 1.0)
    for q in range(len(mel) - 1):
        counts = sums[f"used_q{q}"]
        share = counts[counts > 0] / max(counts.sum(), 1.0)
        entropy = -(share * np.log(share)).sum()
        means |= {f"codes_used_q{q}": (counts > 0).mean(), f"perplexity_q{q}": np.exp(entropy)}
        means["bits_per_second"] += code_rate * entropy / np.log(2)
    if "transcript" in sums:
        unquantized, quantized = sums["transcript"] / max(float(sums["transcript_weight"]), 1.0)
        means |= {"loss_transcript": quantized, "loss_transcript_unquantized": unquantized}
    return {name: float(value) for name, value in means.items()}


def flow_sums(spec: StepSpec, run: RunConfig) -> Callable[[Arrays, Batch], Sums]:
    """The compiled (parameters, batch) -> summed absolute errors of the pre-net's and the sampled mel, and counts."""
    compute = spec.task.compute

    def sums_of(parameters, batch):
        model = spec.assemble(parameters, {})
        hidden, lengths = model.hidden(clips_of(batch, compute))
        mel, lengths = match_lengths(hidden, lengths, mel_targets_of(batch, ("flow",), compute)[0])
        noise = jax.random.normal(jax.random.key(SAMPLING_SEED), mel.shape)
        made = {"prior": model.flow.prenet(hidden, lengths), "sampled": sample_mel(model.flow, hidden, lengths, noise)}
        sums = {name: jnp.abs(mask_padding(x.astype(jnp.float32) - mel, lengths)).sum() for name, x in made.items()}
        return sums | {"count": length_mask(lengths, mel.shape[1]).sum(dtype=jnp.float32) * mel.shape[-1]}

    return jax.jit(sums_of)


def flow_means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`mel_mae` of the sampled mel, `mel_mae_prior` of the pre-net's."""
    count = max(float(sums["count"]), 1.0)
    return {"mel_mae": float(sums["sampled"]) / count, "mel_mae_prior": float(sums["prior"]) / count}


def _first_levels(encoder: AudioEncoderBranch, codes) -> list[Float[Array, "c g d"]]:
    """The sum of the chosen codes of the first 1, 2, ... levels."""
    total, sums, spec = 0.0, [], encoder.compute.rules.spec("batch", None, None)
    for q, table in enumerate(encoder.quantizer.codebooks()):
        total = total + table.at[codes[..., q]].get(out_sharding=spec)
        sums.append(total)
    return sums


def _counts(codes, valid, size: int) -> Float[Array, " k"]:
    chosen = (codes[..., None] == jnp.arange(size)) & valid[..., None]
    return chosen.sum((0, 1), dtype=jnp.float32)
