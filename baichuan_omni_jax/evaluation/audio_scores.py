"""Scores of audio against what it was made from: sums over clips, and the means made of them.

Held-out scores of the tasks that train on audio, and of a tokenizer over clips, window by window. Below them the same
mels made audible and visible: waveforms by HiFT or Griffin-Lim, and small color images, drawn without a plotting
library, as training machines need none.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

from baichuan_omni_jax.audio.decoder import AudioDecoder, DecodedAudio
from baichuan_omni_jax.audio.encoder import AudioEncoderBranch, mel_buckets
from baichuan_omni_jax.audio.mel_training import SAME_RATE, MelTarget, mel_error_sums, same_moments
from baichuan_omni_jax.checkpoint import abstract_branches, find_checkpoint, load_branches, with_shardings
from baichuan_omni_jax.checkpoint.branches import VOCODER_CONFIG, branch_folder
from baichuan_omni_jax.config import MeshConfig, OmniConfig
from baichuan_omni_jax.config.mel_targets import MelTargetSpec, decoded_target, flow_target
from baichuan_omni_jax.config.vocoder import VocoderConfig, read_vocoder_config
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.evaluation.held_out import Sums
from baichuan_omni_jax.flow.matching import sample_mel
from baichuan_omni_jax.flow.model import FlowDecoder
from baichuan_omni_jax.nn.layers import length_mask, mask_padding
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.omni.audio_tokenizer_model import Clips
from baichuan_omni_jax.sharding import make_mesh
from baichuan_omni_jax.vocoder.streaming import HiftWindow, griffin_lim, window_wave

SAMPLING_SEED = 0  # of the noise that a held-out mel is sampled from: the same at every evaluation


class DecodedCodes(NamedTuple):
    """Clips taken through their codes: features, which of them are valid, codes, their sum, the decoded mel."""

    features: Float[Array, "c g f"]
    valid: Bool[Array, "c g"]
    codes: Int32[Array, "c g q"]
    quantized: Float[Array, "c g f"]
    decoded: DecodedAudio


def code_sums(
    encoder: AudioEncoderBranch, decoder: AudioDecoder, clips: Clips, target: MelTarget, ratio: Fraction = SAME_RATE
) -> tuple[Sums, DecodedCodes]:
    """Takes clips through their codes and sums over their valid frames.

    Args:
        encoder: the audio tokenizer.
        decoder: the audio decoder, with its post-net.
        clips: their 16 kHz mels.
        target: the recorded mels to compare with.
        ratio: decoded frames for each of the target's.

    Returns:
        The sums below, and what the clips became.

    `mel` (levels + 1,): absolute error of the refined mel from the features as they are, then from the first 1, 2, ...
    levels of their codes; `mel_count` what to divide it by. `used_q` (codes,): how often each code was chosen.
    `distance` and `distance_count`: commitment.
    """
    # Features as they are, and the codes of all levels.
    features, valid = encoder.features(clips.mel, clips.lengths)
    codes, quantized, _ = encoder.quantizer.quantize(features)
    lengths = valid.sum(-1, dtype=jnp.int32)
    # Decoded from the features, then from the first 1, 2, ... levels: what each level adds to the mel.
    decoded = [decoder(x, lengths) for x in (features, *_first_levels(encoder, codes))]
    errors = [mel_error_sums(each.refined_mel, each.mel_lengths, target, ratio) for each in decoded]
    sums = {"mel": jnp.stack([error for error, _, _ in errors]), "mel_count": errors[0][2]}
    # Use of codes: a histogram a level, of valid frames.
    for q, size in enumerate(encoder.cfg.codebook_sizes):
        chosen = (codes[..., q][..., None] == jnp.arange(size)) & valid[..., None]
        sums[f"used_q{q}"] = chosen.sum((0, 1), dtype=jnp.float32)
    # Commitment, as in training: squared distance to the sum of the chosen codes.
    distance = jnp.where(valid[..., None], (features - quantized).astype(jnp.float32) ** 2, 0)
    sums |= {"distance": distance.sum(), "distance_count": valid.sum(dtype=jnp.float32) * distance.shape[-1]}
    return sums, DecodedCodes(features, valid, codes, quantized, decoded[-1])


def tokenizer_means(sums: Mapping[str, np.ndarray], code_rate: float) -> dict[str, float]:
    """Divides the sums into scores.

    Of all levels and with the first ones only `mel_mae`, `mel_mae_q0`, ...; of the features as they are
    `mel_mae_unquantized`; `commitment`; for each level the share of codes used, `codes_used_q*`, and `perplexity_q*`;
    `bits_per_second` by the codes' own frequencies; `loss_transcript` and `loss_transcript_unquantized`.
    """
    mel = sums["mel"] / max(float(sums["mel_count"]), 1.0)
    means = {"mel_mae": mel[-1], "mel_mae_unquantized": mel[0], "bits_per_second": 0.0}
    means |= {f"mel_mae_q{q}": value for q, value in enumerate(mel[1:])}
    means["commitment"] = sums["distance"] / max(float(sums["distance_count"]), 1.0)
    # Entropy of the codes' frequencies: its exponential is the perplexity, times the code rate the bitrate.
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


def flow_sums(
    flow: FlowDecoder, hidden: Float[Array, "c t d"], mel: Float[Array, "c t mels"], lengths: Int32[Array, " c"]
) -> Sums:
    """Sums the absolute errors of the pre-net's and the sampled mel over the frames before `lengths`.

    Args:
        flow: the flow-matching decoder.
        hidden: the audio decoder's states at 50 Hz, what it is conditioned on.
        mel: the recorded 24 kHz mel at the same frames.
        lengths: valid frames of each clip.

    Returns:
        `prior`, `sampled`, and the `count` of values to divide them by.
    """
    # The same noise at every evaluation, so that scores differ by the weights alone.
    noise = jax.random.normal(jax.random.key(SAMPLING_SEED), mel.shape)
    made = {"prior": flow.prenet(hidden, lengths), "sampled": sample_mel(flow, hidden, lengths, noise)}
    sums = {name: jnp.abs(mask_padding(x.astype(jnp.float32) - mel, lengths)).sum() for name, x in made.items()}
    return sums | {"count": length_mask(lengths, mel.shape[1]).sum(dtype=jnp.float32) * mel.shape[-1]}


def flow_means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`mel_mae` of the sampled mel, `mel_mae_prior` of the pre-net's."""
    count = max(float(sums["count"]), 1.0)
    return {"mel_mae": float(sums["sampled"]) / count, "mel_mae_prior": float(sums["prior"]) / count}


def _first_levels(encoder: AudioEncoderBranch, codes) -> list[Float[Array, "c g d"]]:
    """Sums the chosen codes of the first 1, 2, ... levels."""
    total, sums, spec = 0.0, [], encoder.compute.rules.spec("batch", None, None)
    for q, table in enumerate(encoder.quantizer.codebooks()):
        total = total + table.at[codes[..., q]].get(out_sharding=spec)
        sums.append(total)
    return sums


class TokenizerScores:
    """Takes windows through `audio_encoder` and `audio_decoder` and sums what `code_sums` counts.

    Windows are padded to one of four lengths (`mel_buckets`), so that at most four programs are compiled. `settings`
    are those of the mel that comes back, which is compared frame by frame. Use it with the branches' mesh set.
    """

    def __init__(self, branches: Mapping[str, nnx.Module], cfg: OmniConfig) -> None:
        self._branches = {name: branches[name] for name in ("audio_encoder", "audio_decoder")}
        self._cfg, self._sums = cfg, {}
        self.settings = decoded_target(cfg.post_net)
        self._through = jax.jit(_through)

    def __call__(
        self, mel: Float[np.ndarray, "f mels"], target: Float[np.ndarray, "s bands"]
    ) -> tuple[Int32[np.ndarray, "g q"], Float32[np.ndarray, "t bands"]]:
        """Returns codes and the decoded mel of one window; `target` is its own mel at `settings`."""
        # Padded to the next bucket, so that a window compiles nothing new.
        size = next(size for size in mel_buckets(self._cfg.audio) if size >= len(mel))
        frames = self.settings.frames(
            size * self._cfg.audio.hop_length * self.settings.rate // self._cfg.audio.sampling_rate
        )
        clips = Clips(*_slot(mel, size))
        sums, codes, valid, made, length = self._through(
            self._branches, clips, MelTarget(*_slot(target[:frames], frames))
        )
        # fp64 over all windows.
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)
        return np.asarray(codes[0])[np.asarray(valid[0])], np.asarray(made[0, : int(length[0])], np.float32)

    def means(self) -> dict[str, float]:
        """Returns `tokenizer_means`, and by the codebooks' sizes `max_bits_per_second`. Empty without clips."""
        if not self._sums:
            return {}
        audio = self._cfg.audio
        most = audio.code_rate * sum(np.log2(size) for size in audio.codebook_sizes)
        return tokenizer_means(self._sums, audio.code_rate) | {"max_bits_per_second": float(most)}


def _slot(mel: Float[np.ndarray, "f mels"], size: int):
    padded = np.zeros((1, size, mel.shape[1]), np.float32)
    padded[0, : len(mel)] = mel
    return jnp.asarray(padded), jnp.asarray([len(mel)], jnp.int32)


def _through(branches, clips: Clips, target: MelTarget):
    sums, made = code_sums(branches["audio_encoder"], branches["audio_decoder"], clips, target)
    return sums, made.codes, made.valid, made.decoded.refined_mel, made.decoded.mel_lengths


# Colors from the least to the greatest value: black, violet, red, orange, pale yellow.
_COLORS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])
_PIXELS = 3  # of a mel filter and of a frame
_GAP = 6
_FRAMES = 250  # mels are padded to a multiple of it, so that few programs are compiled


class MelWaves:
    """Makes waveforms of mels at `target`, on this host's first device; `name` is `hift` or `griffin_lim`.

    `vocoder` is a checkpoint with the branch `vocoder` (see `check_vocoder`); empty: Griffin-Lim.
    """

    def __init__(self, target: MelTargetSpec, omni: OmniConfig, vocoder: str = "") -> None:
        self.name = "hift" if vocoder else "griffin_lim"
        self._target, self._mesh = target, make_mesh(MeshConfig(), jax.local_devices()[:1])
        if vocoder:
            self._load(vocoder, omni)

    def __call__(self, mel: Float[np.ndarray, "s mels"]) -> Float32[np.ndarray, " t"]:
        """`target.hop` samples for each frame, in ±1. Silence for a mel that is not finite."""
        if not np.isfinite(mel).all():
            return np.zeros(len(mel) * self._target.hop, np.float32)
        # Griffin-Lim takes any length.
        if self.name == "griffin_lim" or not len(mel):
            return griffin_lim(mel, self._target)
        with jax.set_mesh(self._mesh):
            # HiFT as one window, padded: a new length would compile again.
            frames = -(-len(mel) // _FRAMES) * _FRAMES
            return np.clip(HiftWindow(self._run, self._sizes, frames)(mel.astype(np.float32), 0, True), -1, 1)

    def _load(self, vocoder: str, omni: OmniConfig) -> None:
        home, self._sizes = check_vocoder(vocoder, omni)
        with jax.set_mesh(self._mesh):
            # One device, fp32: the vocoder is small, and other devices are at work on the run.
            compute = ComputePolicy()
            abstract = abstract_branches(omni, self._sizes, only=["vocoder"], compute=compute)["vocoder"]
            placed = with_shardings(abstract, self._mesh, compute.rules, name="vocoder")
            model = load_branches(f"vocoder={home}", {"vocoder": placed})["vocoder"]
            key = jax.device_put(jax.random.key(0), NamedSharding(self._mesh, P()))
            self._run = partial(jax.jit(window_wave), model, key)


def check_vocoder(vocoder: str, omni: OmniConfig) -> tuple[epath.Path, VocoderConfig]:
    """The checkpoint and the sizes of its vocoder. Raises ConfigError when it has none, or one for other mels."""
    home = find_checkpoint(vocoder)
    if not (home / branch_folder("vocoder")).exists() or not (home / VOCODER_CONFIG).exists():
        raise ConfigError(f"eval.vocoder {vocoder} has no branch vocoder with its {VOCODER_CONFIG}")
    # A vocoder of other mels would make noise of them.
    sizes, target = read_vocoder_config(home / VOCODER_CONFIG), flow_target(omni.flow)
    reads = sizes.sampling_rate, sizes.in_channels, sizes.hop_length
    makes = target.rate, target.mels, target.hop
    if reads != makes:
        raise ConfigError(f"eval.vocoder {vocoder} reads (rate, mels, hop) {reads}, the model makes {makes}")
    return home, sizes


def mel_image(
    mels: Sequence[Float[np.ndarray, "_ mels"]], ratios: Sequence[Fraction] = ()
) -> UInt8[np.ndarray, "h w 3"]:
    """Log mels (frames, mels) one above the other, on one scale of colors: time to the right, low filters below.

    `ratios` (default: 1 each) are frames of each mel for a frame of the first, at whose moments the others are drawn.
    Where one has ended, and where a value is not finite, the least is drawn.
    """
    # All mels at the moments of the first one's frames.
    width, ratios = max(len(mels[0]), 1), ratios or [SAME_RATE] * len(mels)
    drawn = [_at_moments(mel, same_moments(width, ratio)) for mel, ratio in zip(mels, ratios, strict=True)]
    # One scale for all panels, by what is finite.
    values = np.concatenate([mel.ravel() for mel in drawn])
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    panels, at = [], np.linspace(0, 1, len(_COLORS))
    # Panels one above the other, low filters at the bottom; a value's color lies between two of the scale's.
    for mel in drawn:
        share = np.nan_to_num((mel - low) / max(high - low, 1e-9), nan=0.0, posinf=0.0, neginf=0.0)
        colors = np.stack([np.interp(share.T[::-1], at, channel) for channel in _COLORS.T], -1)
        panel = colors.astype(np.uint8).repeat(_PIXELS, 0).repeat(_PIXELS, 1)
        panels += [panel, np.full((_GAP, panel.shape[1], 3), 255, np.uint8)]
    return np.concatenate(panels[:-1])


def _at_moments(mel: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """The given frames of a mel, NaN where it has ended."""
    ended = np.full((max(frames[-1] + 1 - len(mel), 0), mel.shape[1]), np.nan)
    return np.concatenate([mel, ended])[frames]
